"""Waiting inside asynchronous tests."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Wait until ``condition()`` is true; fail if it never is."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s"
        await asyncio.sleep(0.001)


async def settle() -> None:
    """Let everything run that is ready, and what that makes ready."""
    for _ in range(20):
        await asyncio.sleep(0)
