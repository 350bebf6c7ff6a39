"""Waiting for a condition instead of sleeping for a fixed time."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

#: How many times longer than asked ``eventually`` waits at the most, however crowded the cores are.
_MOST: Final = 10.0


def eventually(condition: Callable[[], T], timeout: float = 10.0, what: str = "", interval: float = 0.005) -> T:
    """Call ``condition`` until it returns a true value, and return that value.

    Time limits are for a machine with a core for each thread that wants one: while threads share the cores, as when an
    engine compiles beside a test, time counts in proportion.

    :param timeout: longest time to wait, in seconds; ten times that on crowded cores.
    :param what: what the caller is waiting for, for the error message.
    :param interval: time between two calls, in seconds.
    :raises AssertionError: the condition was still false after ``timeout`` seconds.
    """
    began = before = time.monotonic()
    counted = 0.0
    while True:
        value = condition()
        if value:
            return value
        now = time.monotonic()
        counted += (now - before) / _threads_per_core()
        if counted >= timeout or now - began >= _MOST * timeout:
            took = "" if now - began < 1.5 * timeout else f" ({now - began:.1f} s on crowded cores)"
            raise AssertionError(f"timed out after {timeout:g} s waiting for {what or condition}{took}")
        time.sleep(interval)
        # What a sleep takes too long, this process has waited for a core.
        before = max(now, time.monotonic() - 2 * interval)


def _threads_per_core() -> float:
    """Return how many threads of this machine share a core, at least 1."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            runnable = int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1.0
    return max(1.0, runnable / len(os.sched_getaffinity(0)))
