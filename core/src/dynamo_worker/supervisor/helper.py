"""A forked process for work that may block: networks, drivers, dead file systems. Its parent continues.

If no process can be forked (the pids limit is reached), ``run_here`` does the work without one.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import linux, spawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.supervisor.process_tree import Wait

_PIECE = 64 * 1024


class Helper:
    """Runs a function in a child process and returns its text through a pipe.

    :param function: needs nothing but memory: all descriptors above 2 are closed.
    :param limit: seconds after which the kernel ends the child, even if we are dead.
    :raises OSError: out of processes or descriptors.
    """

    def __init__(self, function: Callable[[], str], limit: float) -> None:
        self._output, child = os.pipe()
        try:
            pid = spawn.fork()
        except OSError:
            os.close(self._output)
            os.close(child)
            raise
        if pid == 0:
            _run(function, child, limit)
        os.close(child)
        stat = linux.read_stat(pid)
        #: The child, so that it can be excluded from a kill.
        self.process = linux.Process(pid, stat.start if stat is not None else 0)

    @property
    def descriptor(self) -> int:
        """Descriptor that becomes readable when there is a result, or none."""
        return self._output

    def result(self, wait: Wait, deadline: Callable[[], float]) -> str | None:
        """Return what the function returned, or None if it was killed at the deadline.

        :param deadline: returns the current deadline (monotonic); may change during the wait.
        """
        text = b""
        os.set_blocking(self._output, False)
        while True:
            try:
                piece = os.read(self._output, _PIECE)
            except BlockingIOError:
                remaining = deadline() - time.monotonic()
                if remaining <= 0:
                    linux.send_signal(self.process, signal.SIGKILL)
                    break
                wait(remaining, self._output)
                continue
            if not piece:
                os.close(self._output)
                return text.decode("utf-8", "replace") or None
            text += piece
        os.close(self._output)
        return None


class _TimeIsUpError(BaseException):
    """Ends work in this process. Not an ``Exception``, so no handler of errors swallows it."""


def run_here(function: Callable[[], str], limit: float) -> str | None:
    """Do the work in this process; return None if it took longer than ``limit`` seconds.

    The limit interrupts whatever waits in Python: connections, answers. It cannot interrupt a call that waits inside
    the C library or the kernel, which is what helpers are for.
    """
    armed = True

    def stop(_number: int, _frame: object) -> None:
        if armed:
            raise _TimeIsUpError

    previous = signal.signal(signal.SIGALRM, stop)
    # Repeatedly: Python may drop the first exception, for example in a finalizer.
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, max(0.01, limit), 0.05)
    try:
        return function()
    except _TimeIsUpError:
        return None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, previous)


def _run(function: Callable[[], str], output: int, limit: float) -> None:
    """Run in the child. Never returns."""
    try:
        spawn.reset_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, limit))
        spawn.close_descriptors(output)
        with open(output, "wb") as file:
            file.write(function().encode())
    finally:
        os._exit(0)
