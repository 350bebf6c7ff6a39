"""The parts of an engine that follow from two others: that it pushes its chunks, and that it has operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from dynamo_worker.serving import pulled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from dynamo_worker.engine import Chunk, Request, RequestContext, Send
    from dynamo_worker.operations import Operation, Operations


class PushEngine(ABC):
    """An engine that implements :class:`~dynamo_worker.engine.PushesChunks` derives from it."""

    #: Its operations, once it is started.
    _control: Operations | None = None

    @abstractmethod
    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Answer one request; see :class:`~dynamo_worker.engine.PushesChunks`."""

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Return the chunks of one request, for callers inside this process."""
        return pulled(self.push, request, context)

    def control_routes(self) -> Mapping[str, Operation]:
        """Return the operations under ``/engine/NAME``."""
        return {} if self._control is None else self._control.routes()

    def paused(self) -> bool:
        """Return whether an operator has taken the engine out of service."""
        return self._control is not None and self._control.paused()
