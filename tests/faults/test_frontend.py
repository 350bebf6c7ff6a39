"""The frontend beside a worker: it carries the streams of other workers too, and outlives its own for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing import Cluster, Load
from dynamo_worker.testing.client import chat
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.waiting import eventually

from .test_echo import echoed

if TYPE_CHECKING:
    from dynamo_worker.testing import Worker

FAST = ("--tokens-per-second", "25", "--grace-period", "0")


def with_frontend(cluster: Cluster, *arguments: str) -> Worker:
    """Start a worker with a frontend, of which the cluster's clients make use from now on."""
    port = free_port()
    worker = cluster.worker("--frontend", f"127.0.0.1:{port}", *arguments)
    cluster.url = f"http://127.0.0.1:{port}"
    return worker


def refused(cluster: Cluster) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(cluster.url.rpartition(":")[2])), 5):
        return False
    return True


@pytest.mark.parametrize("end", ["handoff", "worker killed", "supervisor killed", "engine dead"])
def test_streams_of_others_and_those_handed_off_are_finished(cluster: Cluster, end: str) -> None:
    first = with_frontend(cluster, *FAST, "--drain", "handoff", "--process-tree")
    cluster.wait_routed(cluster.worker(*FAST))
    load = cluster.load(6, 100)
    if end == "handoff":
        first.signal(signal.SIGTERM)
    elif end == "engine dead":
        first.signal(signal.SIGKILL, first.child("echo_process:Core"))
    else:
        first.signal(signal.SIGKILL, first.worker_pid if end == "worker killed" else first.pid)
    worker_gone = Path(f"/proc/{first.worker_pid}")
    eventually(lambda: not worker_gone.exists(), 15, "the worker's end")
    eventually(lambda: refused(cluster), 15, "the frontend takes no new connections")
    for number, result in enumerate(load.wait()):
        assert result.ok, load.summary()
        assert result.text == echoed(f"The quick brown fox.{number}", 100)
    codes = {"handoff": 0, "worker killed": 137, "supervisor killed": 137, "engine dead": 1}
    assert first.wait_gone() == codes[end]
    # The supervisor that was killed is gone before the frontend; the guardian is not.
    eventually(lambda: not any(cluster.tmp.glob(f"dw-{first.pid}-*")), 10, "nothing left of the first worker")


def test_abort_ends_them(cluster: Cluster) -> None:
    first = with_frontend(cluster, *FAST, "--drain", "abort")
    cluster.wait_routed(cluster.worker(*FAST))
    load = cluster.load(4, 1000)
    since = first.signal(signal.SIGTERM)
    assert first.wait_gone() == 0
    assert time.monotonic() - since < 10
    assert not any(result.ok for result in load.wait())


def test_a_stop_without_a_supervisor_waits_for_them_too(cluster: Cluster) -> None:
    first = with_frontend(cluster, *FAST, "--drain", "handoff", "--no-supervise")
    cluster.wait_routed(cluster.worker(*FAST))
    load = cluster.load(4, 60)
    first.signal(signal.SIGTERM)
    assert all(result.ok for result in load.wait()), load.summary()
    assert first.wait_gone() == 0


def test_one_without_a_supervisor_and_without_a_worker_ends(cluster: Cluster) -> None:
    """SIGKILL, SIGHUP and SIGQUIT end such a worker at once; nobody but the kernel tells its frontend."""
    worker = with_frontend(cluster, *FAST, "--no-supervise", "--tokens-per-second", "100")
    frontend = Path(f"/proc/{worker.child('frontend')}")
    worker.signal(signal.SIGKILL)
    eventually(lambda: not frontend.exists(), 10, "the frontend's end")
    for left in cluster.tmp.glob("dw-*"):  # nobody cleans up behind a worker without a supervisor
        os.rename(left, cluster.discovery / left.name)


def test_ready_means_that_the_frontend_offers_the_model(cluster: Cluster) -> None:
    for _ in range(3):
        worker = with_frontend(cluster, "--grace-period", "0", "--discovery-path", str(cluster.discovery / "own"))
        assert cluster.chat()[0] == 200
        worker.stop()


def test_host_names_are_resolved(cluster: Cluster) -> None:
    port = free_port()
    worker = cluster.worker("--frontend", f"localhost:{port}", "--system-host", "localhost", "--grace-period", "0")
    cluster.url = f"http://localhost:{port}"
    assert cluster.chat()[0] == 200
    assert worker.status("/health")[0] == 200
    worker.stop()
    cluster.url = ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "echo", "--frontend", "no.such.host.invalid:8000"), "--frontend no.such.host.invalid:8000"),
        (
            ("--engine", "echo", "--system-port", "0", "--system-host", "no.such.host.invalid"),
            "--system-host no.such.host.invalid",
        ),
        (("frontend", "--http", "no.such.host.invalid:8000"), "--http no.such.host.invalid:8000"),
    ],
)
def test_a_name_that_does_not_resolve_is_one_mistake_of_the_usage(
    cluster: Cluster, arguments: tuple[str, ...], said: str
) -> None:
    done = cluster.run(*arguments)
    assert done.returncode == 2
    assert f"{said}: cannot resolve host 'no.such.host.invalid'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("frontend", "--http"), ("--engine", "echo", "--frontend")])
def test_a_discovery_directory_that_cannot_be_made_is_a_mistake_of_the_usage(
    cluster: Cluster, arguments: tuple[str, ...]
) -> None:
    done = cluster.run(*arguments, f"127.0.0.1:{free_port()}", DYN_FILE_KV="/proc/nope")
    assert done.returncode == 2
    assert "the discovery directory /proc/nope cannot be created" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_that_hangs_ends_the_worker(cluster: Cluster) -> None:
    checks = ("--health-check-interval", "0.2", "--health-check-timeout", "1")
    worker = with_frontend(cluster, "--grace-period", "0", *checks)
    since = worker.signal(signal.SIGSTOP, worker.child(r"dynamo_worker frontend"))
    assert worker.wait_gone() == 1
    assert time.monotonic() - since < 10
    assert "the frontend has not answered for 1 s" in worker.log


def test_one_that_is_killed_with_its_streams_makes_a_stop_fail(cluster: Cluster) -> None:
    worker = with_frontend(cluster, *FAST)
    cluster.wait_model()
    load = cluster.load(2, 1000)
    worker.signal(signal.SIGTERM)
    worker.wait_log("Draining", 10)
    worker.signal(signal.SIGKILL, worker.child(r"dynamo_worker frontend"))
    assert worker.wait_gone() == 1
    assert 'reason="the frontend ended before its streams did: killed by signal 9"' in worker.log
    assert not any(result.ok for result in load.wait())


def test_requests_cost_no_line_of_the_log_and_neither_do_clients_that_leave(cluster: Cluster) -> None:
    cluster.start_frontend(DYN_LOG=None)
    (log,) = cluster.discovery.parent.glob("frontend-*.log")
    worker = cluster.worker("--tokens-per-second", "1000", "--grace-period", "0")
    cluster.wait_model()
    cluster.ask(4)
    before = len(log.read_text()), len(worker.log)
    for _ in range(5):
        assert cluster.ask(4).ok
        assert cluster.chat()[0] == 200
    assert cluster.chat(max_tokens=-5)[0] == 400
    cluster.model = "nobody's"
    assert cluster.chat()[0] == 404
    cluster.model = "echo"
    for step in range(10):
        leave_early(cluster, step * 0.002)
    eventually(lambda: worker.metric("dynamo_worker_in_flight") == 0, 10, "no request in flight")
    assert cluster.ask(4).ok
    assert log.read_text()[before[0] :] == ""
    # The one line that is left has a target that the runtime does not let be silenced, at level INFO.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", worker.log[before[1] :]).splitlines()
    assert [line for line in lines if "request_span: request cancellation received" not in line] == []


def leave_early(cluster: Cluster, seconds: float) -> None:
    """Ask for a long stream and go away."""
    body = json.dumps(chat("echo", "x" * 50, 5000)).encode()
    with socket.create_connection(("127.0.0.1", int(cluster.url.rpartition(":")[2]))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        time.sleep(seconds)


def test_a_frontend_alone_lets_its_streams_finish_and_a_second_signal_ends_it(cluster: Cluster) -> None:
    cluster.start_frontend(DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS="60")
    workers = [cluster.worker(*FAST, "--drain", "handoff") for _ in range(2)]
    cluster.wait_routed(workers[1])
    load = cluster.load(4, 60)
    (frontend,) = [process for process in cluster._processes if "frontend" in process.args]
    frontend.terminate()
    eventually(lambda: refused(cluster), 10, "no new connections")
    workers[0].signal(signal.SIGTERM)  # its streams still move
    assert all(result.ok for result in load.wait()), load.summary()
    assert frontend.wait(10) == 0
    cluster.start_frontend(DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS="60")
    cluster.wait_model()
    endless = Load(cluster.url, [chat("echo", "endless", 2000)])
    eventually(endless.started, 10, "the stream starts")
    frontend = cluster._processes[-1]
    frontend.terminate()
    eventually(lambda: refused(cluster), 10, "no new connections")
    frontend.terminate()
    assert frontend.wait(5) == 0
    endless.wait()
