"""The parts of an engine that follow from two others: that it pushes its chunks, and that it has operations."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from dynamo_worker.containment import contained

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

    from dynamo_worker.engine import Chunk, Operation, Request, RequestContext, Send
    from dynamo_worker.kit.engine_control import EngineControl


class PushEngine(ABC):
    """An engine that implements :class:`~dynamo_worker.engine.PushesChunks` derives from it."""

    #: Its operations, once it is started.
    _control: EngineControl | None = None

    @abstractmethod
    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Answer one request; see :class:`~dynamo_worker.engine.PushesChunks`."""

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Return the chunks of one request, for callers inside this process."""
        return pulled(self.push, request, context)

    def control_routes(self) -> Mapping[str, Operation]:
        """Return the operations under ``/engine/NAME``."""
        return {} if self._control is None else self._control.routes()

    async def on_ready(self) -> None:  # noqa: B027 - optional
        """Do nothing; an engine for which somebody waits overrides it."""

    def paused(self) -> bool:
        """Return whether an operator has taken the engine out of service."""
        return self._control is not None and self._control.paused()


async def pulled(
    push: Callable[[Request, RequestContext, Send], Awaitable[None]], request: Request, context: RequestContext
) -> AsyncGenerator[Chunk, None]:
    """Yield what an engine pushes (:class:`~dynamo_worker.engine.PushesChunks`): its ``generate`` in one line."""
    chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
    task = asyncio.ensure_future(contained(lambda: push(request, context, chunks.put_nowait)))
    task.add_done_callback(lambda _: chunks.put_nowait(None))
    try:
        while (chunk := await chunks.get()) is not None:
            yield chunk
        await task
    finally:
        task.cancel()
