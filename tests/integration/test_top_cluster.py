"""`dynamo-worker top` on a real cluster: one worker drained, one killed, and neighbours that answer nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Self

from dynamo_worker.testing import Cluster, Worker

#: An instance id that no runtime has.
STRANGER = "00000000000000aa"


class Top:
    """`dynamo-worker top --json`, refresh after refresh."""

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        command = [sys.executable, "-m", "dynamo_worker", "top", "--json", "--interval", "0.5", *arguments]
        self.process = subprocess.Popen(command, env=cluster.environment(), stdout=subprocess.PIPE, text=True)

    def wait(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 20) -> dict[str, dict[str, Any]]:
        """Return the workers by their ids once a refresh shows what is wanted."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = {worker["instance"]: worker for worker in json.loads(self.process.stdout.readline())["workers"]}
            if wanted(found):
                return found
        raise AssertionError(f"not seen: {found}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def blackhole() -> Iterator[str]:
    """Listen, and never answer; yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def register_stranger(discovery: Path, status: str) -> None:
    """Put the card of a worker into discovery that no runtime has written."""
    card = {"display_name": "\x1b[31mred", "runtime_config": {"runtime_data": {"dynamo_worker_status": status}}}
    name = f"dynamo%2Fbackend%2Fgenerate%2F{STRANGER}"
    (discovery / "v1" / "mdc" / name).write_text(json.dumps({"type": "Model", "card_json": card}))
    (discovery / "v1" / "mdc" / "garbage").write_bytes(b"\xff{")


@pytest.mark.timeout(120)
def test_a_drained_a_killed_and_a_silent_worker(cluster: Cluster) -> None:
    first, second = cluster.serve(2, "--tokens-per-second", "50")
    load = cluster.load(4, 400)
    with blackhole() as address, Top(cluster) as top:
        register_stranger(cluster.discovery, address)
        # The silent one delays nobody: both others are complete while it has not answered.
        found = top.wait(lambda workers: STRANGER in workers and streaming(workers, first, second))
        assert set(found) == {first.instance, second.instance, STRANGER}
        assert sum(found[each.instance]["in_flight"] for each in (first, second)) == 4
        known = found[first.instance]
        assert (known["state"], known["ready"], known["models"]) == ("SERVING", True, ["echo"])
        assert known["status_address"] == f"127.0.0.1:{first.status_port}"
        assert 0 < known["start_s"] < 60
        assert known["age_s"] > 0
        assert known["engine"] == "echo"
        found = top.wait(lambda workers: STRANGER in workers and workers[STRANGER]["reason"] is not None)
        assert (found[STRANGER]["state"], found[STRANGER]["reason"]) == ("no answer", "no answer within 2 s")

        first.operate("control/drain", {"mode": "handoff"})
        found = top.wait(lambda workers: workers[first.instance]["state"] == "drained")
        assert (found[first.instance]["ready"], found[first.instance]["reason"]) == (False, "drained on request")
        register_stranger(cluster.discovery, address)  # runtimes remove what nobody refreshes
        once = cluster.run("top", "--once", "--sort", "state")  # its instances have left discovery, its card has not
        assert once.returncode == 0, once.stderr
        lines = [line for line in once.stdout.splitlines() if "backend/" in line]
        assert ["no answer" in line for line in lines] == [True, False, False], once.stdout
        assert first.instance in lines[1]
        assert "drained on request" in lines[1]
        assert "\x1b" not in once.stdout

        assert all(result.ok for result in load.wait())
        second.signal(signal.SIGKILL, second.worker_pid)
        found = top.wait(lambda workers: workers[second.instance]["state"] == "gone")
        assert found[second.instance]["reason"].endswith("ago, was SERVING")
        register_stranger(cluster.discovery, address)
        show_on_a_terminal(cluster, first.instance)
        top.process.send_signal(signal.SIGINT)
        assert top.process.wait(10) == 0
    first.stop()


def streaming(workers: dict[str, dict[str, Any]], *expected: Worker) -> bool:
    """Return whether all of these workers send chunks."""
    return all(workers[worker.instance]["chunks_per_s"] for worker in expected)


def show_on_a_terminal(cluster: Cluster, instance: str) -> None:
    """Run it in a terminal, which becomes smaller meanwhile, until Ctrl-C."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    command = [sys.executable, "-m", "dynamo_worker", "top", "--interval", "30"]
    environment = cluster.environment(TERM="xterm", COLUMNS=None, LINES=None)
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        screen = read_until(ours, lambda text: instance in text and "Ctrl-C ends this" in text)
        assert "\x1b[?1049h" in screen
        assert "drained" in screen
        assert "\x1b[31mred" not in screen  # the name of a stranger's model
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 200, 0, 0))
        process.send_signal(signal.SIGWINCH)
        read_until(ours, lambda text: "… 1 more, 1 of them not ready" in text)
        process.send_signal(signal.SIGINT)
        read_until(ours, lambda text: "\x1b[?1049l" in text)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: Callable[[str], bool], seconds: float = 20) -> str:
    """Return what a program shows once it is what is wanted."""
    text, end = "", time.monotonic() + seconds
    while not wanted(text):
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"not shown: {text[-3000:]!r}"
        text += os.read(terminal, 1 << 16).decode(errors="replace")
    return text


def test_nothing_to_show(cluster: Cluster, tmp_path: Path) -> None:
    register = cluster.discovery / "v1" / "mdc"
    register.mkdir(parents=True)
    (register / f"other%2Fbackend%2Fgenerate%2F{STRANGER}").write_text("{}")
    result = cluster.run("top", "--once")
    assert result.returncode == 1
    assert f"no worker in namespace dynamo (file: {cluster.discovery})" in result.stderr
    assert "the namespaces with workers are other (1)" in result.stderr
    assert STRANGER.encode() in cluster.run("top", "--once", "--namespace", "oth*").stdout.encode()
    missing = cluster.run("top", "--once", "--discovery-path", str(tmp_path / "missing"))
    assert missing.returncode == 4
    assert "No such file or directory" in missing.stderr
    away = cluster.run("top", "--discovery-backend", "etcd", ETCD_ENDPOINTS="http://127.0.0.1:1")
    assert away.returncode == 4
    assert "discovery cannot be read (etcd: http://127.0.0.1:1): " in away.stderr
    assert "Connection refused" in away.stderr
