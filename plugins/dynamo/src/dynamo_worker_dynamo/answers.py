"""Runs the requests of an engine class: each in a task of its own, which ends as the class's protocol has it.

A class learns from its context and from ``abort`` that nobody wants an answer any more. It is cancelled like any other
code only if that does not end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm.exceptions import Disconnected, DynamoException, StreamIncomplete
from dynamo.runtime import Context

from dynamo_worker.errors import EngineDeadError, describe
from dynamo_worker.kit.deferred_aborts import DeferredAborts
from dynamo_worker.logs import get_logger
from dynamo_worker_dynamo.failures import translated

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from dynamo_worker.engine import RequestContext, Send

log = get_logger(__name__)

#: Seconds in which a class has to end an aborted request by itself, and then those to follow its cancellation.
_PATIENCE: Final = 5.0
_CANCEL_SECONDS: Final = 2.0
#: Seconds until an abort on a decode worker no longer waits for the KV cache: what the kit waits, and a little more.
_TRANSFER_SECONDS: Final = 61.0


def their_context(context: RequestContext) -> Context:
    """Return a context for a class, with the request's id, trace and metadata, and a cancellation of its own.

    The runtime's context is only stopped if the client is gone; a class must also stop when a request is handed off.
    """
    if isinstance(context, Context):
        return context.detached(context.id())
    return Context(context.id())


class _Running:
    """One request in a class's hands.

    :ivar begun: set with the first token, or with the end.
    :ivar wanted: whether somebody still reads the chunks.
    """

    __slots__ = ("begun", "context", "ending", "task", "wanted")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.begun = asyncio.Event()
        self.wanted = True
        self.task: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None


class Answers:
    """The requests that an engine class answers."""

    def __init__(
        self,
        engine: Any,
        run_beside: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_dead: Callable[[EngineDeadError], None],
        stays_well: Callable[[], Awaitable[None]],
        *,
        decode: bool,
    ) -> None:
        """Take the engine.

        :param engine: the ``LLMEngine``.
        :param run_beside: runs what outlives a request; the end of the engine cancels it.
        :param on_dead: called when the class says that it is dead.
        :param stays_well: raises EngineDeadError if the engine breaks within a moment.
        :param decode: whether this is a decode worker: aborts then wait for the KV cache.
        """
        self._engine = engine
        self._run_beside = run_beside
        self._on_dead = on_dead
        self._stays_well = stays_well
        self._deferred = DeferredAborts(self._later) if decode else None
        self._running: dict[str, _Running] = {}

    async def answer(self, request: dict[str, Any], context: RequestContext, send: Send) -> None:
        """Send the chunks of one request."""
        request_id = context.id()
        running = _Running(their_context(context))
        running.task = task = asyncio.ensure_future(self._pump(request, running, send))
        self._running[request_id] = running

        def ended(_: asyncio.Task[None]) -> None:
            running.begun.set()
            if self._running.get(request_id) is running:
                del self._running[request_id]

        task.add_done_callback(ended)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            running.wanted = False
            self._end(running)
            raise
        task.result()

    async def abort(self, request_id: str) -> None:
        """Make the class end a request, and wait until it has; return at once if its KV cache is still on its way."""
        running = self._running.get(request_id)
        if running is None:
            return
        ending = self._end(running)
        if self._deferred is None or running.begun.is_set():
            await asyncio.wait({ending})

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        self._run_beside(work)

    def _end(self, running: _Running) -> asyncio.Task[None]:
        if running.ending is None:
            running.context.stop_generating()
            running.ending = self._run_beside(self._ended(running))
        return running.ending

    async def _ended(self, running: _Running) -> None:
        task = running.task
        assert task is not None

        async def abort() -> None:
            if not task.done():
                await self._engine.abort(running.context)

        try:
            if self._deferred is None:
                await abort()
            else:
                await self._deferred.abort(running.context.id(), running.begun, abort)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(running.begun.wait(), _TRANSFER_SECONDS)
        except Exception as error:
            log.warning("Abort failed", request_id=running.context.id(), error=describe(error))
        for seconds in (_PATIENCE, _CANCEL_SECONDS):
            await asyncio.wait({task}, timeout=seconds)
            if task.done():
                break
            task.cancel()
        else:
            log.warning("The engine class does not end an aborted request", request_id=running.context.id())
            return
        if not task.cancelled() and isinstance(task.exception(), EngineDeadError):
            log.debug("The engine class died with an aborted request", error=task.exception())

    async def _pump(self, request: dict[str, Any], running: _Running, send: Send) -> None:
        context = running.context
        stream: Any = None
        reason: Any = None
        try:
            stream = self._engine.generate(request, context)
            if inspect.iscoroutine(stream):
                stream = await stream
            async for chunk in stream:
                if isinstance(chunk, dict):
                    if chunk.get("token_ids"):
                        running.begun.set()
                    reason = chunk.get("finish_reason")
                    if reason is not None:
                        chunk = _finished(chunk, stopped=context.is_stopped())
                if running.wanted:
                    send(chunk)
        except Exception as error:
            if context.is_stopped() and not running.wanted:
                return  # whatever a class raises to end an aborted request
            failure = await self._meaning(error)
            if isinstance(failure, EngineDeadError):
                self._on_dead(failure)
            if failure is error:
                raise
            raise failure from error
        except (SystemExit, KeyboardInterrupt) as error:
            # It would end the event loop, and with it all other requests.
            raise RuntimeError(f"the engine class raised {describe(error)}") from error
        finally:
            if hasattr(stream, "aclose"):
                await stream.aclose()
        if reason is None and not context.is_stopped():
            raise StreamIncomplete("the engine class ended the answer without a finish reason")

    async def _meaning(self, error: Exception) -> Exception:
        """Return what an error of the class means; one that says nothing may be the first sign of a broken engine."""
        failure = translated(error)
        if failure is error and not isinstance(error, DynamoException):
            try:
                await self._stays_well()
            except EngineDeadError as dead:
                return dead
        return failure


def _finished(chunk: dict[str, Any], *, stopped: bool) -> dict[str, Any]:
    """Return the last chunk of an answer with a finish reason that frontends know.

    :param stopped: whether the request was aborted.
    :raises Disconnected: the class has cancelled the request by itself, so another worker may continue it.
    """
    reason = chunk.get("finish_reason")
    if isinstance(reason, str) and (reason.startswith("abort") or reason == "cancelled"):
        if not stopped:
            raise Disconnected("the engine class has cancelled the request")
        return {**chunk, "finish_reason": "cancelled"}
    if reason == "error":
        raise RuntimeError("the engine class has ended the request with an error, without a message")
    return chunk
