"""A node's part of an engine that is spread over several: supervised like any engine, but without endpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import engine_processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Chunk, Request, RequestContext


class HeadlessNode:
    """What such a part does not do. Its ``start`` and ``shutdown`` are the engine's.

    :ivar TITLE: how the command lines of the engine's processes begin.
    """

    TITLE: bytes

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:  # noqa: ARG002
        """Refuse: requests go to the leader."""
        raise InvalidRequestError("this node serves no requests, the engine's first node does")

    async def abort(self, request_id: str) -> None:
        """Do nothing: there are no requests."""

    def processes(self) -> Iterable[int]:
        """Return the pids of all of the engine's processes here."""
        return engine_processes.named(self.TITLE)

    async def on_ready(self) -> None:
        """Do nothing: nobody waits for this node."""

    async def check_health(self) -> None:
        """Do nothing: the end of a process is seen at once, and requests are the leader's business."""

    def condemn(self) -> None:
        """Do nothing: the processes are ended the same way."""

    async def drain(self, deadline: Deadline) -> None:
        """Do nothing: the leader drains."""
