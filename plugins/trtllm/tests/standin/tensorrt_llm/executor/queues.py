"""The queues between the threads of one process, and the threads that fill them."""

from __future__ import annotations

import asyncio
import collections
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


def has_event_loop() -> bool:
    """Tell whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class AsyncQueue:
    """A queue that belongs to the loop in which it was created: other threads put through `sync_q`, the loop gets."""

    class EventLoopShutdownError(Exception):
        """The loop that the queue belongs to is closed."""

    def __init__(self) -> None:
        self._q: collections.deque[Any] = collections.deque()
        self._event = asyncio.Event()
        self.sync_q = _SyncQueue(self)

    def empty(self) -> bool:
        """Tell whether nothing waits."""
        return not self._q

    def put_nowait(self, item: Any) -> None:
        """Add an item without waking the reader."""
        self._q.append(item)

    def notify(self) -> None:
        """Wake the reader, unless it has taken everything already. Only on the loop."""
        if self._q:
            self._event.set()

    async def get(self, timeout: float | None = None) -> Any:
        """Wait up to `timeout` seconds for the next item; raise `asyncio.TimeoutError` without one."""
        while not self._q:
            await asyncio.wait_for(self._event.wait(), timeout)
        item = self._q.popleft()
        if not self._q:
            self._event.clear()
        return item


class _SyncQueue:
    """The side of an `AsyncQueue` for other threads."""

    def __init__(self, aqueue: AsyncQueue) -> None:
        self._aq = aqueue
        self.loop = asyncio.get_running_loop()

    def put(self, item: Any) -> None:
        """Add an item and wake the loop."""
        self.put_nowait(item)
        self.notify_many(self.loop, [self])

    def put_nowait(self, item: Any) -> None:
        """Add an item without waking the loop; `notify_many` does that for several queues at once."""
        self._aq.put_nowait(item)

    def get(self) -> Any:
        """Take the next item; raise `queue.Empty` without one."""
        try:
            return self._aq._q.popleft()
        except IndexError:
            raise queue.Empty from None

    def empty(self) -> bool:
        """Tell whether nothing waits."""
        return self._aq.empty()

    @staticmethod
    def notify_many(loop: asyncio.AbstractEventLoop, queues: list[_SyncQueue]) -> None:
        """Wake every reader of these queues, all of the same loop, with one coroutine."""

        async def wake() -> None:
            for each in frozenset(queues):
                each._aq.notify()

        if not loop.is_running():
            raise AsyncQueue.EventLoopShutdownError
        asyncio.run_coroutine_threadsafe(wake(), loop)


class ManagedThread(threading.Thread):
    """A daemon thread that repeats a task until it returns False; an exception goes to `error_queue` and ends it."""

    def __init__(
        self, task: Callable[[], bool] | weakref.WeakMethod[Any], error_queue: queue.Queue[Any], name: str
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._task = task
        self._error_queue = error_queue
        self._stop_event = threading.Event()

    def run(self) -> None:
        while not self._stop_event.is_set():
            task = self._task() if isinstance(self._task, weakref.WeakMethod) else self._task
            if task is None:
                return
            try:
                if not task():
                    return
            except AsyncQueue.EventLoopShutdownError:
                return
            except Exception as error:
                self._error_queue.put_nowait(error)
                return
            del task

    def stop(self) -> None:
        """Ask the thread to end after the current round."""
        self._stop_event.set()
