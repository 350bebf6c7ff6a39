"""The engine protocol of dynamo-worker on one side, the engine's thread on the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker import EngineDeadError, EngineInfo
from dynamo_worker.kit.chunks import no_tokens, usage
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error
from dynamo_worker.kit.translation import ModelTable
from dynamo_worker_acme.engine_thread import EngineThread
from dynamo_worker_acme.toy import Toy
from dynamo_worker_acme.translation import TABLE

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker import Chunk, Deadline, EngineContext, Request, RequestContext
    from dynamo_worker_acme.engine_thread import Answer

#: What the frontend needs of the model: `config.json` and the tokenizer. A real engine has a flag for it.
MODEL_DIR = Path(__file__).parent / "model"
#: Of the model: longest sequence in tokens, and number of token ids.
CONTEXT_LENGTH, VOCAB_SIZE = 131_072, 259
#: A prompt of the model's.
_CANARY_PROMPT = (100, 0)


class AcmeEngine(EngineLifecycle):
    """An engine that works in a thread of the worker."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:  # noqa: ARG002 - what all engines get
        self._args = args
        self._table: ModelTable[Any] = ModelTable(TABLE, {}, CONTEXT_LENGTH)
        self._thread: EngineThread | None = None
        self._answers: dict[str, Answer] = {}

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Load the engine and say what it serves."""
        self._thread = EngineThread(lambda: Toy(self._args.tokens_per_second))
        try:
            await self._thread.start()
        except Exception as error:
            raise start_error("the acme engine", error) from error
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
        thread = self._alive()
        prompt, made = request["token_ids"], 0
        answer = self._answers[context.id()] = thread.add(prompt, parameters)
        try:
            while True:
                output = await answer.get()
                if isinstance(output, BaseException):
                    raise output
                token, reason = output
                made += 1
                chunk: Chunk = {"token_ids": [token], "index": 0}
                if reason is not None:
                    chunk["finish_reason"] = reason
                    chunk["completion_usage"] = usage(len(prompt), made, None)
                yield chunk
                if reason is not None:
                    return
        finally:
            thread.abort(answer)  # it may end early: the client is gone
            if self._answers.get(context.id()) is answer:
                del self._answers[context.id()]

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request, if there is any left."""
        answer = self._answers.get(request_id)
        if answer is not None and self._thread is not None:
            self._thread.abort(answer)

    def processes(self) -> Iterable[int]:
        """Return no pids: the engine has no processes."""
        return ()

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> Request:
        """Return a request for one token: the worker warms the engine up with it, and asks whether it is alive."""
        return {"token_ids": list(_CANARY_PROMPT), "stop_conditions": {"max_tokens": 1}}

    def progress(self) -> int:
        """Return the number of steps taken: an engine that is silent for long, but steps, is no hung one."""
        return 0 if self._thread is None else self._thread.steps

    # --- What the hooks call

    async def check_health(self) -> None:
        """Return if the engine is alive.

        :raises EngineDeadError: it is not.
        """
        self._alive()

    async def shutdown(self, deadline: Deadline) -> None:
        """End the engine. Called at any time, even in the middle of the start, and more than once."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.stop(deadline)

    def _alive(self) -> EngineThread:
        if self._thread is None or self._thread.error is not None:
            raise EngineDeadError((self._thread and self._thread.error) or "the acme engine is not started")
        return self._thread
