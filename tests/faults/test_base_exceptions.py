"""What no ``except Exception`` catches (a panic in Rust code, SystemExit, KeyboardInterrupt, CancelledError), at every
place where code that is not ours runs: never a hang, always the right exit code, always the reason.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import pytest

from dynamo_worker.testing import Worker

from .conftest import FaultyCluster

#: The kinds, and how the log names each.
KINDS = {
    "panic": r"PanicException: called `Option::unwrap\(\)` on a `None` value",
    "exit": "SystemExit: 0",
    "interrupt": "KeyboardInterrupt",
    "cancel": "CancelledError",
}
Each = Callable[..., Iterator[tuple[str, Worker, str]]]


@pytest.fixture
def each(faulty: FaultyCluster) -> Each:
    """Return a function that starts one worker for each kind, all at once, and yields each with its name in the log."""

    def each(place: str, *arguments: str) -> Iterator[tuple[str, Worker, str]]:
        workers = {kind: faulty.start("--hook-fault", f"{place}={kind}", *arguments) for kind in KINDS}
        for kind, worker in workers.items():
            yield kind, worker, KINDS[kind]

    return each


@pytest.mark.parametrize("place", ["add_arguments", "create_engine", "start", "generate"])
def test_in_the_start(each: Each, place: str) -> None:
    """The worker cannot start: exit code 3, and the error is the reason. `generate` is asked by the warm-up."""
    for kind, worker, error in each(place):
        code = worker.wait_gone(20)
        if (place, kind) == ("add_arguments", "interrupt"):
            # Nobody has taken SIGINT yet: this is how Ctrl-C arrives.
            assert (code, "interrupted" in worker.log) == (130, True), worker.log
            continue
        assert code == 3, (kind, worker.log)
        worker.wait_log(f"Worker stopped code=3 reason=.*{error}")


def test_while_preparing(each: Each) -> None:
    """What was to be prepared is missed later, if at all."""
    for kind, worker, error in each("prepare"):
        if kind == "interrupt":
            assert worker.wait_gone(20) == 130, worker.log
            continue
        worker.wait_ready()
        worker.wait_log(f"Plugin hook failed hook=prepare plugin=faulty .*{error}")
        worker.stop()


def test_in_the_health_check(each: Each) -> None:
    """A check that is broken itself must not end a healthy engine."""
    for _, worker, error in each("check_health", "--health-check-interval", "0.2"):
        worker.wait_ready()
        worker.wait_log(f"Plugin hook failed hook=check_health plugin=faulty .*{error}")
        worker.stop()


@pytest.mark.parametrize("hook", ["drain", "cleanup"])
def test_in_the_hooks_of_a_stop(each: Each, hook: str) -> None:
    for _, worker, error in each(hook):
        worker.wait_ready()
        worker.stop()
        worker.wait_log(f"Plugin hook failed hook={hook} plugin=faulty .*{error}")
        worker.wait_log('Worker stopped code=0 reason="stopped by SIGTERM"')


def test_in_the_last_words(each: Each) -> None:
    """They do not replace the error, which is a request's or a task's."""
    for kind, worker, error in each("on_fatal_error", "--hook-fault", "task=exit", "--health-check-interval", "0.2"):
        assert worker.wait_gone(20) == 1, (kind, worker.log)
        worker.wait_log('Fatal error kind=SystemExit error="SystemExit: 0" exit_code=1')
        worker.wait_log(f"Plugin hook failed hook=on_fatal_error plugin=faulty .*{error}")
        worker.wait_log('Worker stopped code=1 reason="SystemExit: 0"')


def test_in_a_task_of_the_engines_own(each: Each) -> None:
    """Two of them stop the event loop when they leave a task: the engine wants to end. The others end the task."""
    for kind, worker, error in each("task", "--health-check-interval", "0.2"):
        if kind in ("exit", "interrupt"):
            assert worker.wait_gone(20) == 1, (kind, worker.log)
            worker.wait_log(f'Worker stopped code=1 reason="?{error}')
        else:
            worker.wait_ready()
            worker.stop()


def test_a_start_with_few_descriptors(faulty: FaultyCluster) -> None:
    """The runtime would panic."""
    worker = faulty.start()
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (16, 16))  # before it has begun
    assert worker.wait_gone(20) == 3, worker.log
    worker.wait_log("code=3 reason=.*open files or more, got 16")
