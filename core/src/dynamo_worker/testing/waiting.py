"""Waiting for something to become true, instead of sleeping and hoping."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def eventually(condition: Callable[[], T], timeout: float = 10.0, what: str = "", interval: float = 0.005) -> T:
    """Return ``condition()`` as soon as it is true.

    :param timeout: seconds until the wait is given up.
    :param what: what is waited for, for the message.
    :raises AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(interval)
