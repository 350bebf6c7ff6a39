"""The worker's process as the supervisor sees it, with a real child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.escalation import KillCause
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.loop import Loop
from dynamo_worker.supervisor.worker_process import WorkerProcess

from .conftest import state_of, wait_until


@pytest.fixture
def loop():
    handler = signal.getsignal(signal.SIGCHLD)
    it = Loop((), lambda number: None, lambda pid, code: None)
    yield it
    it.close()
    signal.signal(signal.SIGCHLD, handler)


@pytest.fixture
def child():
    """A child that sleeps, with a handler for SIGUSR1."""
    code = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: None); print(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as it:
        it.stdout.readline()
        yield it
        it.kill()


def process_of(child) -> Process:
    stat = linux.read_stat(child.pid)
    assert stat is not None
    return Process(child.pid, stat.start)


def test_before_it_has_started():
    worker = WorkerProcess()
    assert (worker.pid, worker.ended, worker.alive) == (None, False, False)
    assert not worker.signal(signal.SIGTERM)
    assert not worker.catches(signal.SIGUSR1)


def test_its_end_is_seen_without_the_guardian(child, loop):
    worker = WorkerProcess()
    worker.started(process_of(child), loop)
    assert worker.alive
    assert not worker.ended
    descriptors = len(os.listdir("/proc/self/fd"))
    worker.kill(KillCause.DEADLINE)
    wait_until(lambda: loop.pump(0.05) or worker.ended)
    assert worker.exit_code is None, "only the parent learns it"
    assert worker.gone_at == pytest.approx(time.monotonic(), abs=5)
    assert not worker.alive
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1, "the pidfd is closed"


def test_one_that_was_gone_before_it_was_announced(child, loop):
    process = process_of(child)
    child.kill()
    wait_until(lambda: state_of(child.pid) == "Z")
    worker = WorkerProcess()
    worker.started(process, loop)
    assert worker.ended
    assert not worker.alive


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_kill_that_comes_too_early_is_made_up_for(child, loop, monkeypatch, pidfd):
    """The guardian starts the worker after the third signal."""
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", _refuse)
    worker = WorkerProcess()
    worker.kill(KillCause.FORCED)
    assert worker.killed_at is not None
    worker.started(process_of(child), loop)
    assert child.wait(10) == -signal.SIGKILL


def test_the_first_kill_counts_and_the_last_cause(child, loop):
    worker = WorkerProcess()
    worker.started(process_of(child), loop)
    worker.kill(KillCause.STUCK)
    first = worker.killed_at
    worker.kill(KillCause.FORCED)
    assert (worker.killed_at, worker.kill_cause) == (first, KillCause.FORCED)


def test_handlers(child, loop):
    worker = WorkerProcess()
    worker.started(process_of(child), loop)
    assert worker.catches(signal.SIGUSR1)
    assert not worker.catches(signal.SIGUSR2)
    assert worker.signal(signal.SIGUSR1)
    assert child.poll() is None


def _refuse(*_):
    raise PermissionError(1, "refused")
