"""Waiting for a condition instead of sleeping for a fixed time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def eventually(condition: Callable[[], T], timeout: float = 10.0, what: str = "", interval: float = 0.005) -> T:
    """Call ``condition`` until it returns a true value, and return that value.

    :param timeout: longest time to wait, in seconds.
    :param what: what the caller is waiting for, for the error message.
    :param interval: time between two calls, in seconds.
    :raises AssertionError: the condition was still false after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"timed out after {timeout:g} s waiting for {what or condition}")
        time.sleep(interval)
