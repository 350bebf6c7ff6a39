"""Requests in an engine that takes them, and their aborts, in calls that may block, and that acknowledges aborts."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from dynamo_worker.kit.answer import Answer
from dynamo_worker.kit.blocking import Lane
from dynamo_worker.kit.deferred_aborts import DeferredAborts
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from dynamo_worker.engine import Send

log = get_logger(__name__)

_T = TypeVar("_T")

#: Seconds within which an engine has to take an abort, and to acknowledge it.
_ABORT_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.05


class TrackedAnswer(Answer, ABC, Generic[_T]):
    """An answer whose request is in the engine until the engine says otherwise, even if nobody waits any more.

    :ivar finished: set once the engine has nothing more to report.
    """

    def __init__(self, send: Send) -> None:
        """Start an answer.

        :param send: takes its chunks.
        """
        super().__init__(send)
        self.finished = asyncio.Event()

    @abstractmethod
    def follow(self, handle: _T) -> None:
        """Report what the engine does from now on; each engine has its own way.

        :param handle: what the engine has returned for the request.
        """

    def give_up(self, error: BaseException) -> None:
        """End the answer with an error after which the engine reports nothing more."""
        self.finished.set()
        self.fail(error)


class RequestsInFlight(Generic[_T]):
    """The requests that an engine works on.

    One thread makes all calls: one that blocks, because a process of the engine has just died, holds up neither the
    event loop nor the end of the process.
    """

    def __init__(
        self,
        name: str,
        abort: Callable[[_T], object],
        *,
        may_abort: Callable[[], bool],
        run_beside: Callable[[Coroutine[Any, Any, None]], None],
        fetches: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin without requests.

        :param name: of the thread.
        :param abort: tells the engine to stop the work for a request; called in the thread.
        :param may_abort: returns whether the engine can take aborts.
        :param run_beside: runs the aborts that nobody waits for
            (:meth:`~dynamo_worker.kit.push_engine.PushEngine.run_beside`).
        :param fetches: returns whether a request's KV cache comes from another worker: its abort waits for that.
        """
        self._lane = Lane(name)
        self._abort, self._may_abort, self._run_beside = abort, may_abort, run_beside
        self._fetches, self._deferred = fetches, DeferredAborts(run_beside)
        #: What the engine has returned for each request, and the request's answer.
        self._running: dict[str, tuple[_T, TrackedAnswer[_T]]] = {}

    async def answer(self, request_id: str, answer: TrackedAnswer[_T], submit: Callable[[], _T]) -> None:
        """Hand a request to the engine, and wait until its client has the last chunk.

        :param submit: gives the request to the engine and returns the engine's handle; called in the thread.
        """
        submitted = self._lane.call(submit)
        try:
            handle = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            # The engine may have it all the same, and has to be told that nobody waits.
            submitted.add_done_callback(lambda done: self._abort_late(request_id, done, answer))
            raise
        self._running[request_id] = (handle, answer)
        answer.follow(handle)
        try:
            await answer.wait()
        finally:
            # A later request may have taken the id; it is still in the engine.
            running = self._running.get(request_id)
            if answer.finished.is_set() and running is not None and running[1] is answer:
                del self._running[request_id]

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request, and wait until the engine has acknowledged that.

        Do not wait for a request that fetches its KV cache and has not begun.
        """
        running = self._running.pop(request_id, None)
        if running is not None:
            await self._end(request_id, *running)

    async def idle(self) -> None:
        """Return once the engine works on no request."""
        while self._running:
            await asyncio.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Take no more requests, nor aborts: the engine is shut down."""
        self._lane.close()

    def _abort_late(self, request_id: str, submitted: asyncio.Future[_T], answer: TrackedAnswer[_T]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            answer.follow(submitted.result())
            self._run_beside(self._end(request_id, submitted.result(), answer))

    async def _end(self, request_id: str, handle: _T, answer: TrackedAnswer[_T]) -> None:
        if self._fetches():
            await self._deferred.abort(request_id, answer.begun, lambda: self._acknowledged(request_id, handle, answer))
        else:
            await self._acknowledged(request_id, handle, answer)

    async def _acknowledged(self, request_id: str, handle: _T, answer: TrackedAnswer[_T]) -> None:
        if not self._may_abort() or answer.finished.is_set():
            return
        try:
            await asyncio.wait_for(self._lane.call(self._abort, handle), _ABORT_SECONDS)
            await asyncio.wait_for(answer.finished.wait(), _ABORT_SECONDS)
        except asyncio.TimeoutError:
            log.warning("The engine has not acknowledged an abort", request=request_id, next="it computes on")
