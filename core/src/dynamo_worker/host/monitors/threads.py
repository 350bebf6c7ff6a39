"""Checks that this process can still start threads."""

from __future__ import annotations

import _thread
import asyncio
from typing import TYPE_CHECKING, Final

from dynamo_worker.errors import NoThreadsError, StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.errors import WorkerError

_PROBLEM: Final = "no thread can be started, so requests would wait forever"
_HINT: Final = "raise the pids limit (pids.max, ulimit -u) or the memory limit (ulimit -v); find out what uses it up"


def can_start_thread() -> bool:
    """Return whether one more thread can be started: not if a pids limit is reached or the address space is full."""
    try:
        # Not `threading.Thread`: its `start` waits forever for a thread that dies at birth for lack of memory.
        _thread.start_new_thread(_nothing, ())
    except (RuntimeError, MemoryError):
        return False
    return True


def require_thread() -> None:
    """Check that one more thread can be started.

    :raises StartError: it cannot.
    """
    if not can_start_thread():
        raise StartError(_PROBLEM, hint=_HINT)


def _nothing() -> None:
    """Return at once: the thread only proves that it can be started."""


class ThreadMonitor:
    """Notices that no more threads can be started.

    The runtime needs a thread for each request that finds none idle. If it gets none, the request waits forever and
    never reaches the engine, while the worker looks healthy (measured on 1.6.1).
    """

    #: Failures in a row that are fatal: a limit may be reached for a moment.
    FAILURES = 3

    def __init__(self, on_fatal: Callable[[WorkerError], None], *, interval: float) -> None:
        """Try every ``interval`` seconds."""
        self._on_fatal = on_fatal
        self._interval = interval

    async def run(self) -> None:
        """Try until cancelled or until ``FAILURES`` attempts in a row have failed."""
        failures = 0
        while failures < self.FAILURES:
            await asyncio.sleep(self._interval)
            failures = 0 if can_start_thread() else failures + 1
        self._on_fatal(NoThreadsError(_PROBLEM, hint=_HINT))
