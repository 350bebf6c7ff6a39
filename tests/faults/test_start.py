"""Starts that fail, hang, or are stopped: one clear error, a prompt end, nothing left."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.cluster import free_port

from .conftest import PLUGINS, FaultyCluster


@pytest.mark.parametrize("fault", ["block", "gil", "hang"])
def test_sigterm_during_a_start_that_hangs(faulty: FaultyCluster, fault: str) -> None:
    worker = faulty.start("--start-fault", fault)
    worker.wait_log("Waiting in the start")
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(9) == 0
    print(f"gone after {time.monotonic() - since:.2f} s")


@pytest.mark.parametrize("kind", ["hang", "block"])
def test_sigterm_during_a_start_that_cannot_be_cleaned_up(faulty: FaultyCluster, kind: str) -> None:
    """Nothing is in flight: it does not take the termination grace period."""
    worker = faulty.start("--start-fault", "hang", "--hook-fault", f"cleanup={kind}")
    worker.wait_log("Waiting in the start")
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone(9) == 0
    worker.wait_log("Worker stopped code=0 reason=.stopped during (the )?start")


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_sigterm_before_the_worker_logs_anything(faulty: FaultyCluster, delay: float) -> None:
    worker = faulty.start()
    time.sleep(delay)
    worker.signal(signal.SIGTERM)
    code = worker.wait_gone(9)
    # Once there is a handler, the stop is clean and logged. Before that, the signal's default action ends the process.
    assert code == (0 if "Received shutdown signal" in worker.log else 143), worker.log


@pytest.mark.parametrize(
    ("fault", "message"),
    [("error", "no CUDA-capable device is detected"), ("bug", "a bug in the engine")],
)
def test_a_start_that_fails(faulty: FaultyCluster, fault: str, message: str) -> None:
    worker = faulty.start("--start-fault", fault)
    assert worker.wait_gone(20) == 3
    assert message in worker.log


def test_a_first_request_that_never_returns(faulty: FaultyCluster) -> None:
    worker = faulty.start("--compile-seconds", "60", "--warmup-timeout", "1")
    assert worker.wait_gone(20) == 3
    assert "did not answer its first request within 1 s" in worker.log


def test_the_reason_is_left_for_kubernetes(faulty: FaultyCluster, tmp_path: Path) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    worker = faulty.start("--start-fault", "error", "--termination-message-path", str(message))
    assert worker.wait_gone(20) == 3
    assert "no CUDA-capable device is detected" in message.read_text()


BAD_INPUT = {
    "unknown engine": (["--engine", "vlm"], 2, "vlm"),
    "unknown engine with a suggestion": (["--engine", "ecko"], 2, "echo"),
    "unknown flag": (["--engine", "echo", "--tokens-per-secnd", "3"], 2, "--tokens-per-second"),
    "bad value": (["--engine", "echo", "--tokens-per-second", "fast"], 2, "fast"),
    "bad setting": (["--engine", "echo", "--system-port", "99999"], 2, "system-port"),
    "no engine": ([], 2, "--engine"),
    "unreadable configuration": (["--engine", "echo", "--config", "/nonexistent/config.yaml"], 2, "config.yaml"),
    "contradiction": (["--engine", "echo", "--grace-period", "40"], 2, "grace"),
    "unwritable discovery": (["--engine", "echo", "--discovery-path", "/proc/discovery"], 2, "/proc/discovery"),
    "model without configuration": (["--engine", "faulty", "--model-directory", "/nonexistent"], 3, "/nonexistent"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(cluster: Cluster, case: str) -> None:
    arguments, code, message = BAD_INPUT[case]
    result = cluster.run(*arguments, PYTHONPATH=str(PLUGINS))
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert message in output
    assert "Traceback" not in output


def test_unreachable_discovery(cluster: Cluster) -> None:
    result = cluster.run(
        *["--engine", "echo", "--discovery-backend", "etcd", "--discovery-timeout", "0.5"],
        ETCD_ENDPOINTS=f"http://127.0.0.1:{free_port()}",
    )
    assert result.returncode == 4, result.stderr
    assert "etcd cannot be reached" in result.stderr
    assert "Connection refused" in result.stderr


@pytest.mark.parametrize("flag", ["--system-port", "--frontend"])
def test_a_port_in_use(cluster: Cluster, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        value = str(port) if flag == "--system-port" else f"127.0.0.1:{port}"
        result = cluster.run("--engine", "echo", flag, value)
    assert result.returncode == 3, result.stderr
    assert f"127.0.0.1:{port} is in use" in result.stderr
