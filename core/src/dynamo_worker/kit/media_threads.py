"""Calls that may hang for long, such as lookups of names and reads of network file systems: few at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

#: Most threads, those included whose callers have given up.
_MOST: Final = 32


class WaitingThreads:
    """Threads for calls that mostly wait. One that hangs keeps its place until it returns.

    The end of the process does not wait for them.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_MOST)

    async def call(self, function: Callable[..., _T], *arguments: Any, limit: float) -> _T:
        """Return the result of a function that runs in a thread.

        :param limit: longest wait in seconds, for a free thread as well; the thread goes on.
        :raises asyncio.TimeoutError: the function takes longer.
        """
        return await asyncio.wait_for(self._call(function, *arguments), limit)

    async def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        result: Future[_T] = Future()
        result.set_running_or_notify_cancel()  # a caller that gives up does not cancel the thread

        def run() -> None:
            try:
                result.set_result(function(*arguments))
            except BaseException as error:
                result.set_exception(error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._free.release)

        threading.Thread(target=run, name="media", daemon=True).start()
        return await asyncio.wrap_future(result)
