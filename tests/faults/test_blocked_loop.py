"""A worker whose event loop is blocked for a while: it lives, its supervisor says so, and where it is blocked."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from dynamo_worker.testing import Load, Worker
from dynamo_worker.testing.client import chat

from .conftest import FaultyCluster

#: Seconds for which the plugin blocks, and within which the probe has to be answered.
NAP, ANSWER = 9.0, 0.05
#: Seconds that a worker may wait for a core and still be judged by the clock, and how often it is tried.
STARVED, ATTEMPTS = 0.3, 4


def probe(port: int) -> tuple[float, bytes]:
    """Ask once whether the worker lives; return how many seconds that took, and the answer."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return time.monotonic() - began, answer


def probes(worker: Worker, seconds: float) -> list[tuple[float, bytes]]:
    """Ask for so many seconds, every 50 ms."""
    until, answers = time.monotonic() + seconds, []
    while time.monotonic() < until:
        answers.append(probe(worker.status_port))
        time.sleep(0.05)
    return answers


@pytest.mark.parametrize(
    ("prompt", "where"), [("nap", "generate"), ("search", "match")], ids=["sleeps", "holds the GIL"]
)
def test_it_lives_and_says_where_it_is_blocked(faulty: FaultyCluster, prompt: str, where: str) -> None:
    """A worker that waits for a core is blocked as well, and says so first: that one proves nothing."""
    for left in reversed(range(ATTEMPTS)):
        worker = faulty.serving("--stall-timeout", "0")
        pids = worker.pid, worker.worker_pid
        try:
            nap_and_look(faulty, worker, prompt, where)
        except AssertionError:
            print(f"waited for a core for {(waited := starved(pids)):.2f} s")
            if waited < STARVED or not left:
                raise
            worker.signal(signal.SIGKILL)
            worker.wait_gone()
        else:
            worker.stop()
            return


def starved(pids: tuple[int, ...]) -> float:
    """Return for how many seconds the main threads of processes could run and got no core."""
    waits = [Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1] for pid in pids]
    return sum(map(int, waits)) / 1e9


def nap_and_look(faulty: FaultyCluster, worker: Worker, prompt: str, where: str) -> None:
    nap = Load(faulty.cluster.url, [chat("echo", prompt, 4)])
    answers = probes(worker, NAP + 1)
    assert all(result.ok for result in nap.wait()), nap.summary()
    lasted = sorted(seconds for seconds, _ in answers)
    print(f"{len(lasted)} probes: median {lasted[len(lasted) // 2] * 1000:.2f} ms, longest {lasted[-1] * 1000:.2f} ms")
    assert all(answer.startswith(b"HTTP/1.1 200 ") for _, answer in answers)
    assert all(b'"state": "SERVING"' in answer for _, answer in answers)
    lines = re.findall(r".*Worker event loop is blocked.*", worker.log)
    print(*lines, sep="\n")
    assert len(lines) == 1
    assert f"{where} (" in lines[0]
    assert 1 < float(re.search(r"no_heartbeat_s=([\d.]+)", lines[0])[1]) < 3
    assert "event loop is unresponsive" not in worker.log
    # On crowded cores even an idle process waits for longer than that.
    assert lasted[-1] < ANSWER or os.getloadavg()[0] > (os.cpu_count() or 1)


def test_it_lives_while_its_start_blocks(faulty: FaultyCluster) -> None:
    """A start may do so for minutes, so nobody expects heartbeats, and nothing is reported."""
    worker = faulty.start("--start-fault", "block")
    worker.wait_log("Waiting in the start")
    answers = probes(worker, 3)
    assert all(b'"state": "STARTING"' in answer for _, answer in answers)
    assert "event loop is blocked" not in worker.log
    worker.signal(signal.SIGKILL)
    worker.wait_gone()


def test_without_heartbeats_only_the_probe_finds_it(faulty: FaultyCluster) -> None:
    worker = faulty.serving("--heartbeat-timeout", "0", "--stall-timeout", "0")
    assert probe(worker.status_port)[1].startswith(b"HTTP/1.1 200 ")
    nap = Load(faulty.cluster.url, [chat("echo", "nap", 4)])
    time.sleep(1)
    seconds, answer = probe(worker.status_port)
    assert seconds > 2
    assert answer.startswith(b"HTTP/1.1 200 ")
    nap.wait()
    worker.stop()
