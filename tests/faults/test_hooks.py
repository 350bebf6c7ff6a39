"""Hooks that hang, raise, block or ignore their cancellation: logged with the plugin's name, never in the way."""

from __future__ import annotations

import signal
import time

import pytest

from .conftest import FaultyCluster


@pytest.mark.parametrize("hook", ["drain", "cleanup"])
@pytest.mark.parametrize("kind", ["raise", "hang", "stubborn"])
def test_a_broken_shutdown_hook(faulty: FaultyCluster, hook: str, kind: str) -> None:
    worker = faulty.serving(
        *["--hook-fault", f"{hook}={kind}", "-p", "witness"],
        *["--termination-grace-period", "10", "--engine-shutdown-timeout", "2"],
    )
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(15) == 0
    print(f"gone after {time.monotonic() - since:.2f} s")
    assert "Plugin hook failed" in worker.log or "abandoned" in worker.log
    assert "faulty" in worker.log
    assert "witness: drain" in worker.log
    assert "witness: cleanup" in worker.log


def test_a_cleanup_that_blocks_the_event_loop(faulty: FaultyCluster) -> None:
    """Nothing inside the worker can help: the supervisor ends it at the deadline."""
    worker = faulty.serving("--hook-fault", "cleanup=block", "--termination-grace-period", "10")
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(15) == 6
    print(f"gone after {time.monotonic() - since:.2f} s")


def test_a_health_check_that_never_answers(faulty: FaultyCluster) -> None:
    worker = faulty.serving(
        *["--hook-fault", "check_health=hang", "--health-check-interval", "0.5", "--health-check-timeout", "1"]
    )
    assert worker.wait_gone(15) == 1
    assert "did not answer within 1 s" in worker.log


def test_a_health_check_that_is_broken_itself(faulty: FaultyCluster) -> None:
    """A bug in a check must not end a healthy engine."""
    worker = faulty.serving("--hook-fault", "check_health=raise", "--health-check-interval", "0.2")
    worker.wait_log("check_health is broken")
    time.sleep(2)
    assert worker.running
    assert faulty.cluster.ask().ok


def test_last_words_that_hang(faulty: FaultyCluster) -> None:
    worker = faulty.serving("--hook-fault", "on_fatal_error=hang", "-p", "witness")
    faulty.cluster.ask(prompt="dead")
    assert worker.wait_gone(15) == 1
    assert "witness: on_fatal_error" in worker.log
    assert "witness: cleanup" in worker.log
