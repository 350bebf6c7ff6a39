"""The event loop of supervisor and guardian."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dynamo_worker.supervisor.loop import Loop

from .conftest import wait_until


@pytest.fixture
def loop():
    """A loop that catches SIGUSR2 and tells what came."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)}
    it = Loop([signal.SIGUSR2], lambda number: it.received.append(number), lambda pid, code: None)
    it.received = []
    yield it
    it.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("seconds", [2147484.0, 3e6, 1e12, float("inf")])
def test_no_wait_is_too_long(loop, seconds):
    """Beyond 24.8 days epoll itself refuses."""
    os.kill(os.getpid(), signal.SIGUSR2)
    loop.pump(seconds)
    assert loop.received == [signal.SIGUSR2]


def test_a_signal_that_somebody_else_catches_is_not_the_loops(loop):
    """A timer's SIGALRM is no request to stop."""
    caught = []
    signal.signal(signal.SIGUSR1, lambda number, _: caught.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_until(lambda: caught)
    loop.pump(0.0)
    assert loop.received == []


def test_the_wait_ends_in_time(loop):
    started = time.monotonic()
    loop.pump(0.05)
    assert 0.04 < time.monotonic() - started < 5
