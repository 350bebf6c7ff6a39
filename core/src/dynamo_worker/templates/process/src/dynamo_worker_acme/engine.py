"""The engine protocol of dynamo-worker on one side, the engine's process on the other."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker import EngineInfo
from dynamo_worker.kit.child_process import ChildProcess
from dynamo_worker.kit.chunks import no_tokens, usage
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
from dynamo_worker.kit.translation import ModelTable
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
    """An engine that works in a process of its own."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._table: ModelTable[Any] = ModelTable(TABLE, {}, CONTEXT_LENGTH)
        self._core = ChildProcess(
            "the acme engine",
            "dynamo_worker_acme.core:AcmeCore",
            {"tokens_per_second": args.tokens_per_second},
            directory=context.private_dir,
        )

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the process, wait until the engine is loaded, and say what it serves."""
        await self._core.start()
        return EngineInfo(
            model_name=self._args.served_model_name,
            model_path=str(MODEL_DIR),
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
        )

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Yield each token as it comes."""
        parameters = self._table.read(request)
        if parameters is None:  # no token is wanted
            yield no_tokens()
            return
        prompt, made = request["token_ids"], 0
        payload = {"prompt": prompt, "parameters": parameters}
        # Closed early, because the client is gone, it aborts the request.
        async with contextlib.aclosing(self._core.generate(context.id(), payload)) as outputs:
            async for token, reason in outputs:
                made += 1
                chunk: Chunk = {"token_ids": [token], "index": 0}
                if reason is not None:
                    chunk["finish_reason"] = reason
                    chunk["completion_usage"] = usage(len(prompt), made, None)
                yield chunk

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request, if there is any left."""
        await self._core.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the pid of the process: the worker ends when it dies."""
        return self._core.processes()

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> Request:
        """Return a request for one token: the worker warms the engine up with it, and asks whether it is alive."""
        return {"token_ids": list(_CANARY_PROMPT), "stop_conditions": {"max_tokens": 1}}

    def progress(self) -> int:
        """Return the number of steps taken: an engine that is silent for long, but steps, is no hung one."""
        return self._core.progress()

    # --- What the hooks call

    async def check_health(self) -> None:
        """Return when the process has answered between two steps; the worker gives it some seconds.

        :raises EngineDeadError: it has ended.
        """
        await self._core.check_health()

    async def shutdown(self, deadline: Deadline) -> None:
        """End the process. Called at any time, even in the middle of the start, and more than once."""
        await self._core.shutdown(deadline)
