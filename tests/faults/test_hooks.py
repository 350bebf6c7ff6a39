"""Hooks that hang, raise, block or ignore their cancellation: logged with the plugin's name, never in the way."""

from __future__ import annotations

import re
import signal
import time

import pytest

from dynamo_worker.testing import Worker

from .conftest import FaultyCluster

#: How each kind of failure is logged: its error, and whether the hook is abandoned.
ERRORS = {"raise": "RuntimeError: {} is broken", "hang": "TimeoutError: ", "stubborn": "TimeoutError: "}


def check_log(worker: Worker, hook: str, kind: str) -> None:
    """Check that the failure of a hook is logged once, with the plugin's name and the right reason."""
    failures = re.findall(rf"Plugin hook failed hook={hook} plugin=(\S+) \S+ error=\"([^\"]*)\"", worker.log)
    assert [plugin for plugin, _ in failures] == ["faulty"]
    assert failures[0][1].startswith(ERRORS[kind].format(hook))
    abandoned = f"Plugin hook ignores its cancellation and is abandoned hook={hook} plugin=faulty"
    assert (abandoned in worker.log) == (kind == "stubborn")


@pytest.mark.parametrize("kind", ["raise", "hang", "stubborn"])
def test_a_broken_on_ready_hook_does_not_keep_the_worker_from_serving(faulty: FaultyCluster, kind: str) -> None:
    worker = faulty.serving("--hook-fault", f"on_ready={kind}", "-p", "witness", "--health-check-timeout", "1")
    assert faulty.cluster.ask().ok, "requests are served while the hook runs"
    worker.wait_log("Plugin hook failed hook=on_ready")
    if kind == "stubborn":
        worker.wait_log("is abandoned hook=on_ready")
    check_log(worker, "on_ready", kind)
    assert worker.log.count("witness: on_ready model=echo") == 1
    assert worker.running
    assert faulty.cluster.ask().ok
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone(15) == 0


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
    check_log(worker, hook, kind)
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


def test_an_on_fatal_error_hook_that_hangs(faulty: FaultyCluster) -> None:
    worker = faulty.serving("--hook-fault", "on_fatal_error=hang", "-p", "witness")
    faulty.cluster.ask(prompt="dead")
    assert worker.wait_gone(15) == 1
    assert "witness: on_fatal_error" in worker.log
    assert "witness: cleanup" in worker.log
