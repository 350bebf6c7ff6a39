"""A worker whose event loop or interpreter hangs: its supervisor sees it, says where it hangs, and ends it."""

from __future__ import annotations

import signal
import time

import pytest

from dynamo_worker.testing import Load
from dynamo_worker.testing.client import chat

from .conftest import FaultyCluster


@pytest.mark.parametrize(("prompt", "where"), [("block", "generate"), ("gil", "hold_gil")])
def test_wedged_while_serving(faulty: FaultyCluster, prompt: str, where: str) -> None:
    worker = faulty.serving("--tokens-per-second", "50", "--heartbeat-timeout", "3", "--stall-timeout", "0")
    load = faulty.cluster.load(4, 200)
    since = time.monotonic()
    wedge = Load(faulty.cluster.url, [chat("echo", prompt, 10)])
    faulty.cluster.engine_args = ["--engine", "echo"]
    faulty.cluster.worker()
    code = worker.wait_gone(20)
    print(f"gone after {time.monotonic() - since:.2f} s")
    assert code == 1
    assert "most recent call first" in worker.log
    assert where in worker.log
    assert all(result.ok for result in load.wait()), load.summary()
    assert all(result.ok for result in wedge.wait()), wedge.summary()


def test_a_stop_reaches_a_wedged_worker(faulty: FaultyCluster) -> None:
    """The event loop never sees the stop: the deadline of the supervisor ends it."""
    worker = faulty.serving("--heartbeat-timeout", "0", "--stall-timeout", "0", "--termination-grace-period", "8")
    wedge = Load(faulty.cluster.url, [chat("echo", "gil", 10)])
    time.sleep(0.5)
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(12) == 6
    print(f"gone after {time.monotonic() - since:.2f} s")
    wedge.wait()


def test_a_stopped_and_continued_worker_is_not_ended(faulty: FaultyCluster) -> None:
    """A debugger, or a laptop that slept: shorter than the heartbeat timeout, longer than the stall timeout."""
    worker = faulty.serving("--heartbeat-timeout", "20", "--stall-timeout", "2", "--tokens-per-second", "50")
    load = faulty.cluster.load(2, 300)
    worker.signal(signal.SIGSTOP, worker.worker_pid)
    time.sleep(4)
    worker.signal(signal.SIGCONT, worker.worker_pid)
    assert all(result.ok for result in load.wait()), load.summary()
    assert worker.running
    assert "Fatal" not in worker.log
