"""An engine that works without an answer is left alone for a while; one that hangs is gone as fast as ever.

The engine's core waits for its rank in a busy loop where a test says so, as those of big engines do: its CPU time tells
nothing.
"""

from __future__ import annotations

import re
import signal
import time

import pytest

from dynamo_worker.testing import Load, Worker
from dynamo_worker.testing.client import chat

from .conftest import FaultyCluster

STALL_TIMEOUT = 4.0
BUSY_TIMEOUT = 12.0
#: Seconds that the machine may add.
SLACK = 2.0
#: Longer than the first bound, shorter than the second one.
WORK_SECONDS = 8

CORE, RANK = r"faulty_processes\.py core", r"faulty_processes\.py rank"


def serving(faulty: FaultyCluster, *arguments: str, waits: str = "spin") -> Worker:
    timeouts = ["--stall-timeout", str(STALL_TIMEOUT), "--stall-timeout-busy", str(BUSY_TIMEOUT)]
    return faulty.serving("--core-waits", waits, *timeouts, *arguments)


def ask(faulty: FaultyCluster, prompt: str) -> Load:
    return Load(faulty.cluster.url, [chat("echo", prompt, 5)])


def assert_stalled(worker: Worker, since: float, least: float, most: float, reason: str) -> None:
    code = worker.wait_gone(most + 10)
    took = time.monotonic() - since
    print(f"gone after {took:.2f} s")
    assert code == 1
    assert least <= took <= most + SLACK, worker.log
    (fatal,) = re.findall(r"Fatal error kind=EngineStalledError.*", worker.log)
    assert re.search(reason, fatal), fatal


def end(worker: Worker) -> None:
    assert "Fatal" not in worker.log
    worker.stop()


@pytest.mark.parametrize(
    ("word", "sign"),
    [("work", r"process \d+ \(\S+\) (used|runs)"), ("compile", r"compiler cc1plus runs \(process \d+\)")],
)
def test_work_in_mid_serving_ends_nothing(faulty: FaultyCluster, word: str, sign: str) -> None:
    """Neither the request that compiles is lost, nor those behind it."""
    worker = serving(faulty, "--health-check-timeout", str(STALL_TIMEOUT), "--health-asks-rank")
    compiling = ask(faulty, f"{word} {WORK_SECONDS}")
    time.sleep(1)
    others = [ask(faulty, f"hello {number}") for number in range(4)]
    for load in (compiling, *others):
        assert all(result.ok for result in load.wait(30)), load.summary()
    assert re.search(rf"No progress, but the engine works .*sign=.{sign}", worker.log), worker.log
    assert re.search(rf"No answer to a health check, but the engine works .*sign=.{sign}", worker.log), worker.log
    assert "The engine makes progress again" in worker.log
    end(worker)


def test_a_process_that_stops_while_another_works(faulty: FaultyCluster) -> None:
    worker = serving(faulty, waits="sleep")
    load = ask(faulty, "work 100")
    worker.wait_log("No progress, but the engine works")
    since = worker.signal(signal.SIGSTOP, worker.child(CORE))
    assert_stalled(worker, since, 0.0, STALL_TIMEOUT, r"process \d+ \(\S+\) is stopped \(state T\)")
    load.wait()


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_stopped_rank_below_a_core_that_spins(faulty: FaultyCluster, busy: bool) -> None:
    worker = serving(faulty)
    loads = [ask(faulty, "sleep 0.5") for _ in range(4)] if busy else []
    time.sleep(0.3)
    since = worker.signal(signal.SIGSTOP, worker.child(RANK))
    assert_stalled(worker, since, 0.0, STALL_TIMEOUT, r"process \d+ \(\S+\) is stopped \(state T\)")
    for load in loads:
        load.wait()


@pytest.mark.parametrize("waits", ["sleep", "spin"])
def test_a_dead_lock(faulty: FaultyCluster, waits: str) -> None:
    """The process waits for a lock, and the core for the process."""
    worker = serving(faulty, waits=waits)
    since = time.monotonic()
    load = ask(faulty, "deadlock 0")
    assert_stalled(worker, since, 0.0, STALL_TIMEOUT, "no compiler runs, and the busiest process")
    assert "the engine works" not in worker.log
    load.wait()


def test_a_dead_lock_that_spins(faulty: FaultyCluster) -> None:
    """It looks like work, so it takes the second bound."""
    worker = serving(faulty)
    since = time.monotonic()
    load = ask(faulty, "work 100")
    assert_stalled(worker, since, STALL_TIMEOUT + 1, BUSY_TIMEOUT, r"although the engine works: process \d+")
    load.wait()


def test_a_health_check_without_an_answer_beside_work(faulty: FaultyCluster) -> None:
    """The second bound holds for it, too, where nobody sends canaries."""
    worker = faulty.serving(
        *("--core-waits", "spin", "--stall-timeout", "0", "--stall-timeout-busy", "6"),
        *("--health-check-timeout", "3", "--health-asks-rank"),
    )
    since = time.monotonic()
    load = ask(faulty, "work 100")
    assert_stalled(worker, since, 5.0, 8.0, r"health check of faulty did not answer .*although the engine works")
    load.wait()
