"""Work that may block: in a process of its own, and without one."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time

import pytest

from dynamo_worker.supervisor import spawn
from dynamo_worker.supervisor.helper import Helper, run_here
from dynamo_worker.supervisor.loop import readable


def wait(seconds, descriptor):
    readable(descriptor, seconds)


def soon():
    return time.monotonic() + 10.0


#: The timer and the signal are what is tested here.
pytestmark = pytest.mark.timeout(method="thread")


@pytest.fixture(autouse=True)
def nothing_left():
    """No timer, no handler, no child, no descriptor."""
    handler, descriptors = signal.getsignal(signal.SIGALRM), set(os.listdir("/proc/self/fd"))
    yield
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


class TestHelper:
    def run(self, function):
        helper = Helper(function, 5.0)
        result = helper.result(wait, soon)
        os.waitpid(helper.process.pid, 0)
        return result

    def test_what_it_says_comes_back(self):
        assert self.run(lambda: "done in " + str(len("x" * 7))) == "done in 7"

    def test_a_long_text_comes_back_whole(self):
        assert self.run(lambda: "x" * 300_000) == "x" * 300_000

    def test_no_process_can_be_made(self, monkeypatch):
        def refuse():
            raise BlockingIOError(errno.EAGAIN, "no")

        monkeypatch.setattr(spawn, "fork", refuse)
        with pytest.raises(BlockingIOError):
            Helper(lambda: "", 1.0)


class TestWithoutOne:
    def test_the_result(self):
        assert run_here(lambda: "done", 5.0) == "done"

    def test_errors_are_the_callers(self):
        def fail():
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            run_here(fail, 5.0)

    def test_a_wait_ends_whatever_handles_errors_on_its_way(self):
        one, other = socket.socketpair()

        def work():
            while True:
                with contextlib.suppress(Exception):
                    one.recv(1)
                    return "never"

        started = time.monotonic()
        with one, other:
            assert run_here(work, 0.05) is None
        assert time.monotonic() - started < 5

    def test_a_time_that_is_over_already(self):
        assert run_here(lambda: time.sleep(100) or "never", -1.0) is None

    def test_the_callers_own_alarm_stays(self):
        signal.setitimer(signal.ITIMER_REAL, 500.0)
        try:
            assert run_here(lambda: "done", 5.0) == "done"
            assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
