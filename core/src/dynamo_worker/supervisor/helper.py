"""A forked process for work that may block: networks, drivers, dead file systems. It cannot hold its parent up.

Where no process can be made (the pids limit is reached), ``run_here`` does the work without one.
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
    """Runs a function in a child process; its text comes back through a pipe.

    :param function: must not need anything but memory: all descriptors above 2 are closed.
    :param limit: seconds after which the kernel ends the child, whatever becomes of us.
    :raises OSError: there can be no more processes, or no more descriptors.
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
        #: The child, to leave it out of what is killed.
        self.process = linux.Process(pid, stat.start if stat is not None else 0)

    def result(self, wait: Wait, deadline: Callable[[], float]) -> str | None:
        """Return what the function returned, or None if it had not by the deadline (it is ended then).

        :param deadline: the current deadline on the monotonic clock; it may move while this waits.
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
    """Ends work that is done in this process; nothing that handles errors stops it."""


def run_here(function: Callable[[], str], limit: float) -> str | None:
    """Do the work in this process; return None if it was not done within ``limit`` seconds.

    The limit ends whatever waits in Python: connections, answers. It cannot end a call that waits inside the C library
    or the kernel, which is what helpers are for.
    """
    armed = True

    def stop(_number: int, _frame: object) -> None:
        if armed:
            raise _TimeIsUpError

    previous = signal.signal(signal.SIGALRM, stop)
    # Again and again: Python may drop the first, in a finalizer for one.
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
    """Be the child. Never returns."""
    try:
        spawn.reset_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, limit))
        spawn.close_descriptors(output)
        with open(output, "wb") as file:
            file.write(function().encode())
    finally:
        os._exit(0)
