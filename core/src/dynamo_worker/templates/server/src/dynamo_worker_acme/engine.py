"""The engine protocol of dynamo-worker on one side, requests to the server on the other."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dynamo.llm.exceptions import Disconnected

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError
from dynamo_worker.kit.canary import text_canary
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error
from dynamo_worker.kit.text import TextChunks, is_chat
from dynamo_worker_acme.server import RefusedError, Server
from dynamo_worker_acme.translation import body

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker import Deadline, EngineContext, RequestContext
    from dynamo_worker.text import TextRequest

#: Of the model: longest sequence in tokens.
CONTEXT_LENGTH = 131_072
#: What OpenAI's servers answer to a client's mistake.
_CLIENTS_MISTAKES = (400, 404, 413, 415, 422)


class AcmeEngine(EngineLifecycle):
    """An engine that is a server in a process of its own. It takes and gives text, as the server does."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._name: str = args.served_model_name
        self._args = args
        self._context = context
        self._server: Server | None = None
        self._steps = 0

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the server, wait until it answers, and say what it serves."""
        try:
            self._server = Server(self._args, self._context.private_dir)
            await self._server.wait_ready()
        except (OSError, RuntimeError) as error:
            raise start_error("the acme engine", error) from error
        return EngineInfo(
            model_name=self._name,
            model_path=self._name,  # no file is read of a model that takes text
            model_input="text",
            context_length=CONTEXT_LENGTH,
        )

    # A request and its chunks are those of OpenAI's API: `TextRequest` and `TextChunk` of `dynamo_worker.text`.
    async def generate(self, request: Any, context: RequestContext) -> AsyncIterator[Any]:
        """Yield the chunks of the server's answer."""
        asked = {**body(request), "stream": True}  # the frontend makes one answer of the chunks if its client wants one
        if TextChunks(request, context).wants_usage:
            asked["stream_options"] = {"include_usage": True}
        path = "/v1/chat/completions" if is_chat(request) else "/v1/completions"
        server, finished = self._alive(), False
        try:
            # Closed early, it closes the connection: the server stops its work.
            async with contextlib.aclosing(server.complete(path, asked)) as chunks:
                async for chunk in chunks:
                    self._steps += 1
                    finished = finished or any(choice.get("finish_reason") for choice in chunk["choices"])
                    yield {**chunk, "model": request["model"]}
        except RefusedError as error:
            if error.status in _CLIENTS_MISTAKES:
                raise InvalidRequestError(str(error)) from error
            raise
        except (OSError, EOFError):
            finished = False
        if finished:
            return
        if await server.has_died():
            raise EngineDeadError(f"the server exited with code {server.exit_code}")
        raise Disconnected("the server has closed the connection in the middle of an answer")

    async def abort(self, request_id: str) -> None:
        """Do nothing: the end of `generate` closes the connection."""

    def processes(self) -> Iterable[int]:
        """Return the server's pid."""
        return () if self._server is None else (self._server.pid,)

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> TextRequest:
        """Return a request for one token: the worker warms the engine up with it, and asks whether it is alive."""
        return text_canary(self._name)

    def progress(self) -> int:
        """Return the number of chunks that the server has sent."""
        return self._steps

    # --- What the hooks call

    async def check_health(self) -> None:
        """Return if the server says that it is well.

        :raises EngineDeadError: its process has ended.
        """
        server = self._alive()
        try:
            await server.check()
        except (OSError, EOFError):
            if await server.has_died():
                raise EngineDeadError(f"the server exited with code {server.exit_code}") from None
            raise

    async def shutdown(self, deadline: Deadline) -> None:
        """End the server. Called at any time, even in the middle of the start, and more than once."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(deadline)

    def _alive(self) -> Server:
        if self._server is None:
            raise EngineDeadError("the acme engine is not started")
        return self._server
