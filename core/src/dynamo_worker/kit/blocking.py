"""Calls into an engine that may block for ever, kept off the event loop and out of the way of the exit."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = get_logger(__name__)

_T = TypeVar("_T")

#: Seconds between two readings of a source that has nothing new, the least and the most.
_PAUSE, _LONGEST_PAUSE = 0.01, 0.1


class LastingThread(threading.Thread):
    """A thread that stays on purpose: see ``lasting`` of :func:`in_thread`."""


async def in_thread(
    function: Callable[..., _T], *arguments: Any, name: str, limit: float | None = None, lasting: bool = False
) -> _T:
    """Run a function in a thread of its own, which the end of the process does not wait for, and return its result.

    :func:`asyncio.to_thread` has few threads, and a process joins them before it ends.

    :param name: of the thread.
    :param limit: longest wait in seconds; the thread goes on.
    :param lasting: whether the thread stays when the function has returned, for a function that starts processes: the
        kernel ends those that ask for it (``PR_SET_PDEATHSIG``) with the thread that has started them.
    :raises asyncio.TimeoutError: the function takes longer.
    """
    result: Future[_T] = Future()
    result.set_running_or_notify_cancel()  # a caller that gives up does not cancel the thread

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)
        if lasting:
            threading.Event().wait()

    kind = LastingThread if lasting else threading.Thread
    kind(target=run, name=name, daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(result), limit)


class OneAtATime(Generic[_T]):
    """A question to an engine that answers one after the other: who asks meanwhile gets the same answer."""

    def __init__(self, ask: Callable[[], Awaitable[_T]]) -> None:
        self._ask = ask
        self._asked: asyncio.Future[_T] | None = None

    async def answer(self) -> _T:
        """Return the next answer; a caller that gives up does not withdraw the question."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asked)

    def cancel(self) -> None:
        """Withdraw the question."""
        if self._asked is not None:
            self._asked.cancel()


class Lane:
    """One thread for calls that must keep their order, such as messages to an engine's processes.

    A call sees the caller's event loop as the running one: what it creates there belongs to that loop.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    def call(self, function: Callable[..., _T], *arguments: Any) -> asyncio.Future[_T]:
        """Call a function after all earlier ones; cancel the future to skip it if it has not begun."""
        loop = asyncio.get_running_loop()
        return asyncio.wrap_future(self._executor.submit(_on_behalf, loop, function, *arguments))

    def close(self) -> None:
        """Take no more calls; the thread ends after those that it has."""
        self._executor.shutdown(wait=False)


def _on_behalf(loop: asyncio.AbstractEventLoop, function: Callable[..., _T], *arguments: Any) -> _T:
    asyncio._set_running_loop(loop)  # noqa: SLF001 - exported for such cases, though with an underscore
    try:
        return function(*arguments)
    finally:
        asyncio._set_running_loop(None)  # noqa: SLF001


class Poller(Generic[_T]):
    """Reads a blocking source of news in a thread, and hands the news over on the event loop."""

    def __init__(self, read: Callable[[], _T], take: Callable[[_T], None], name: str) -> None:
        """Start reading.

        :param read: returns the news, something false if there are none; an exception means the same.
        :param take: called with the news on the event loop.
        :param name: of the thread.
        """
        self._read, self._take = read, take
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading, after the call that is under way."""
        self._stopped.set()

    async def stopped(self, limit: float) -> None:
        """Stop reading, and wait for the call that is under way: some never return once the engine is shut down.

        :param limit: longest wait in seconds.
        """
        self.stop()
        await asyncio.to_thread(self._thread.join, limit)

    def _run(self) -> None:
        pause = _PAUSE
        while not self._stopped.wait(pause):
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                news = self._read()
                if news and not self._stopped.is_set():
                    self._loop.call_soon_threadsafe(self._take, news)
                    pause = _PAUSE
            except Exception as error:
                log.debug("Nothing could be read", thread=threading.current_thread().name, error=error, next="retry")
