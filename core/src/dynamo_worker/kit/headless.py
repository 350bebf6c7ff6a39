"""A node of a multi-node engine that serves no requests itself: supervised processes without endpoints."""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from dynamo_worker.engine import EngineInfo
from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import engine_processes
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle

if TYPE_CHECKING:
    import argparse
    import subprocess
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Chunk, EngineContext, Request, RequestContext

_POLL_SECONDS = 0.05


class HeadlessNode(EngineLifecycle, ABC):
    """The node's part of the engine; a subclass only launches the processes."""

    #: How the command lines of the engine's processes begin.
    TITLE: ClassVar[bytes]
    #: The signal that asks the processes to end.
    END_SIGNAL: ClassVar[signal.Signals] = signal.SIGTERM
    #: Seconds they get until they are killed.
    END_SECONDS: ClassVar[float] = 1.0

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self.args = args
        self.context = context

    @abstractmethod
    async def launch(self) -> str:
        """Start the processes of this node, wait until they are ready, and return the model's name.

        :raises StartError: they fail to start.
        """

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Launch the processes. The leader, not this node, registers the model."""
        return EngineInfo(model_name=await self.launch(), model_path=None)

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:  # noqa: ARG002
        """Refuse the request.

        :raises InvalidRequestError: always.
        """
        raise InvalidRequestError("this node serves no requests; send them to the engine's leader node")

    async def abort(self, request_id: str) -> None:
        """Do nothing: there are no requests."""

    def processes(self) -> Iterable[int]:
        """Return the pids of the engine's processes on this node."""
        return engine_processes.named(self.TITLE)

    async def shutdown(self, deadline: Deadline) -> None:
        """Ask the processes to end, wait, and kill the rest."""
        await engine_processes.end(self.TITLE, self.END_SIGNAL, self.END_SECONDS, deadline)


class ChildNode(HeadlessNode):
    """A node whose part of the engine is a single child process."""

    TITLE: ClassVar = b""
    child: subprocess.Popen[bytes] | None = None

    def processes(self) -> Iterable[int]:
        """Return the pid of the child."""
        return [] if self.child is None else [self.child.pid]

    async def shutdown(self, deadline: Deadline) -> None:
        """Ask the child to end, wait, and kill it."""
        if self.child is not None:
            self.child.send_signal(self.END_SIGNAL)
            patience = deadline.within(self.END_SECONDS)
            while self.child.poll() is None and not patience.passed:
                await asyncio.sleep(_POLL_SECONDS)
            self.child.kill()
