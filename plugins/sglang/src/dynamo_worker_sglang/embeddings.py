"""The engine that makes embeddings: SGLang runs the model once over each input of a request.

The inputs of a request reach the scheduler in batches of tokens, which it can run together; no task is started for any
of them. Texts are tokenized here.
"""

from __future__ import annotations

import asyncio
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError, StartError
from dynamo_worker.embeddings import EmbeddingSpec
from dynamo_worker.engine import LocalContext
from dynamo_worker_sglang import disaggregation
from dynamo_worker_sglang.engine import SglangEngine, Started, context_length
from dynamo_worker_sglang.manager import EmbeddingRequest
from dynamo_worker_sglang.outputs import Vector

if TYPE_CHECKING:
    import argparse
    from collections.abc import Coroutine, Sequence

    from dynamo_worker import Deadline, EngineContext, RequestContext, embeddings
    from dynamo_worker.engine import Send
    from dynamo_worker.kit.publishing import KvEvents
    from dynamo_worker_sglang.manager import Manager

#: Inputs that are submitted before the event loop may do something else, and texts that are tokenized before those of
#: another request may be.
_BATCH: Final = 32
#: Characters of texts that are tokenized on the event loop: less than a millisecond. A thread takes longer to start.
_FEW_CHARACTERS: Final = 2048


class Role(disaggregation.Role):
    """The only role of a worker that makes embeddings."""

    @property
    def endpoint_types(self) -> tuple[str, ...]:
        """The OpenAI APIs it serves."""
        return ("embedding",)


class SglangEmbeddingEngine(SglangEngine):
    """SGLang with a model that makes embeddings."""

    ROLE: ClassVar = Role

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args, context)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        #: Numbers in a vector, as the model has shown.
        self._dimensions = 0
        #: Most tokens of an input.
        self._most_tokens = 0

    def check(self, manager: Manager) -> None:
        """Check that SGLang runs the model for embeddings.

        :raises StartError: it does not.
        """
        if manager.is_generation:
            raise StartError(f"SGLang runs {manager.model_path} for generation only", hint="choose another model")

    async def warm_up(self) -> None:
        """Find out what the model's vectors are like.

        :raises StartError: it makes no embeddings, or none of one vector for each input.
        """
        (vector,) = await self._vectors(self.started, [self._canary_tokens()], {}, LocalContext("warm-up"), None)
        numbers: Any = vector.numbers
        if not isinstance(numbers, list) or not numbers or not isinstance(numbers[0], float):
            raise StartError(
                f"{self.started.manager.model_path} makes no embeddings: SGLang returns {numbers!r:.80} for an input",
                hint="choose another model",
            )
        self._dimensions = len(numbers)
        # SGLang keeps room for a token that would be generated.
        self._most_tokens = context_length(self.started.manager) - 1

    def describe(self, started: Started) -> EngineInfo:
        """Return the properties of the model and its vectors."""
        info, model = super().describe(started), started.manager.model_config
        shorter = (model.matryoshka_dimensions or True) if model.is_matryoshka else False
        return replace(
            info,
            context_length=self._most_tokens,
            model_input="text",
            embeddings=EmbeddingSpec(self._dimensions, shorter),
        )

    def kv_events(self, started: Started) -> KvEvents | None:  # noqa: ARG002 - of the base class
        """Return None: frontends do not route embeddings by prefix."""
        return None

    def canary_request(self) -> Any:
        """Return a request for the embedding of the canary's token."""
        return {"model": self.started.settings["served_model_name"], "inputs": [self._canary_tokens()]}

    def _canary_tokens(self) -> list[int]:
        return list(super().canary_request()["token_ids"])

    async def push(self, request: Any, context: RequestContext, send: Send) -> None:
        """Answer one request (:mod:`dynamo_worker.embeddings`)."""
        started = self.started
        if started.manager.failure is not None:
            raise EngineDeadError(started.manager.failure)
        await started.control.admit()
        with started.control.lora_adapter(request) as adapter:
            inputs = await self._tokenized(started, request)
            vectors = await self._vectors(started, inputs, request, context, None if adapter is None else adapter.name)
        answer: Any = {
            "embeddings": [array("f", vector.numbers).tobytes() for vector in vectors],
            "prompt_tokens": sum(vector.prompt_tokens for vector in vectors),
        }
        send(answer)

    async def _vectors(
        self,
        started: Started,
        inputs: Sequence[list[int]],
        request: Any,
        context: RequestContext,
        adapter: str | None,
    ) -> list[Vector]:
        """Let SGLang run the model over each input."""
        manager, request_id = started.manager, context.id()
        vectors = [Vector() for _ in inputs]
        ids = [f"{request_id}-{number}" for number in range(len(inputs))]
        headers = context.trace_headers() if started.settings["enable_trace"] else None
        self._answers[request_id] = ids
        tasks: list[asyncio.Future[None]] = []
        try:
            for first in range(0, len(inputs), _BATCH):
                part = slice(first, first + _BATCH)
                run = manager.run(
                    EmbeddingRequest(
                        rid=ids[part],
                        input_ids=list(inputs[part]),
                        dimensions=request.get("dimensions"),
                        lora_path=adapter,
                        external_trace_header=headers,
                        vectors=vectors[part],
                    )
                )
                if len(inputs) <= _BATCH:
                    await run
                    return vectors
                tasks.append(asyncio.ensure_future(run))
                await asyncio.sleep(0)
            await asyncio.gather(*tasks)
            return vectors
        finally:
            self._answers.pop(request_id, None)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _tokenized(self, started: Started, request: embeddings.EmbeddingRequest) -> list[list[int]]:
        """Return the tokens of all inputs.

        :raises InvalidRequestError: a text has too many, or the request asks for what SGLang does not do.
        """
        if request.get("truncate_prompt_tokens") is not None or request.get("add_special_tokens") is False:
            name = "truncate_prompt_tokens" if "truncate_prompt_tokens" in request else "add_special_tokens"
            raise InvalidRequestError(f"{name} is not supported by this engine")
        inputs: list[Any] = list(request["inputs"])
        texts = [number for number, one in enumerate(inputs) if isinstance(one, str)]
        manager, most = started.manager, self._most_tokens

        def tokenize(numbers: Sequence[int]) -> None:
            batch, _ = _at_once(manager._tokenize_texts([inputs[number] for number in numbers]))  # noqa: SLF001
            for number, tokens in zip(numbers, batch, strict=True):
                if not 0 < len(tokens) <= most:  # without any, the scheduler would exit
                    raise InvalidRequestError(
                        f"input[{number}] has {len(tokens)} tokens; the model's context length is {most}"
                    )
                inputs[number] = tokens

        if sum(len(inputs[number]) for number in texts) <= _FEW_CHARACTERS and len(texts) <= _BATCH:
            if texts:
                tokenize(texts)
            return inputs
        loop = asyncio.get_running_loop()
        for first in range(0, len(texts), _BATCH):
            await loop.run_in_executor(self._tokenizing, tokenize, texts[first : first + _BATCH])
        return inputs

    async def shutdown(self, deadline: Deadline) -> None:
        """Kill SGLang's processes."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        await super().shutdown(deadline)


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("SGLang's tokenizer waits for something")
