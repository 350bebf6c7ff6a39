"""The engine protocol of dynamo-worker on one side, requests to the server on the other."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo.llm.exceptions import Disconnected

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError
from dynamo_worker.kit.chunks import no_tokens, usage
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error
from dynamo_worker.kit.translation import ModelTable
from dynamo_worker_acme.server import RefusedError, Server
from dynamo_worker_acme.translation import TABLE

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker import Chunk, Deadline, EngineContext, Request, RequestContext

#: What the frontend needs of the model: `config.json` and the tokenizer. A real engine has a flag for it.
MODEL_DIR = Path(__file__).parent / "model"
#: Of the model: longest sequence in tokens, and number of token ids.
CONTEXT_LENGTH, VOCAB_SIZE = 131_072, 259
#: A prompt of the model's.
_CANARY_PROMPT = (100, 0)


class AcmeEngine(EngineLifecycle):
    """An engine that is a server in a process of its own."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._context = context
        self._table: ModelTable[Any] = ModelTable(TABLE, {}, CONTEXT_LENGTH)
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
            model_name=self._args.served_model_name,
            model_path=str(MODEL_DIR),
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
        )

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:  # noqa: ARG002
        """Yield the tokens of each event of the server's answer."""
        parameters = self._table.read(request)
        if parameters is None:  # no token is wanted
            yield no_tokens()
            return
        server = self._alive()
        prompt, made = request["token_ids"], 0
        body = {"prompt": prompt, "stream": True, "return_token_ids": True, **parameters}
        try:
            # Closed early, it closes the connection: the server stops its work.
            async with contextlib.aclosing(server.complete(body)) as events:
                async for event in events:
                    choice = event["choices"][0]
                    tokens, reason = choice.get("token_ids") or [], choice.get("finish_reason")
                    self._steps += 1
                    made += len(tokens)
                    chunk: Chunk = {"token_ids": tokens, "index": 0}
                    if reason is not None:
                        chunk["finish_reason"] = reason
                        chunk["completion_usage"] = usage(len(prompt), made, None)
                    yield chunk
                    if reason is not None:
                        return
        except RefusedError as error:
            if error.status in (400, 413, 422):  # it is the client's mistake
                raise InvalidRequestError(str(error)) from error
            raise
        except (OSError, EOFError):
            pass
        if await server.has_died():
            raise EngineDeadError(f"the server exited with code {server.exit_code}")
        raise Disconnected("the server has closed the connection")  # another worker may finish the answer

    async def abort(self, request_id: str) -> None:
        """Do nothing: the end of `generate` closes the connection."""

    def processes(self) -> Iterable[int]:
        """Return the server's pid."""
        return () if self._server is None else (self._server.pid,)

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> Request:
        """Return a request for one token: the worker warms the engine up with it, and asks whether it is alive."""
        return {"token_ids": list(_CANARY_PROMPT), "stop_conditions": {"max_tokens": 1}}

    def progress(self) -> int:
        """Return the number of events that the server has sent."""
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
