"""The echo engine that makes embeddings (``--embedding``): vectors that depend on the tokens of an input only."""

from __future__ import annotations

import math
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from dynamo_worker.embeddings import EmbeddingSpec
from dynamo_worker.engines.echo_text import FIRST_BYTE, TokenEngine
from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.embeddings import EmbeddingAnswer, EmbeddingRequest
    from dynamo_worker.engine import Chunk, EngineInfo, RequestContext
    from dynamo_worker.requests import Request

#: Numbers in a vector.
DIMENSIONS: Final = 64
#: Multiplies token ids, so that neighbours among them lie far apart.
_SPREAD: Final = 2_654_435_761


class EchoEmbeddingEngine(EngineLifecycle):
    """Makes embeddings as fast as another echo engine generates as many tokens, in the process in which it does.

    :param tokens: the engine that generates.
    :param model_name: the name clients ask for.
    :param takes_text: whether it tokenizes by itself.
    """

    def __init__(self, tokens: TokenEngine, model_name: str, *, takes_text: bool) -> None:
        self._tokens = tokens
        self._model_name = model_name
        self._takes_text = takes_text
        self._context_length = 0

    async def start(self, worker_id: int) -> EngineInfo:
        """Start the engine that generates."""
        info = await self._tokens.start(worker_id)
        self._context_length = info.context_length or 0
        return replace(
            info,
            endpoint_types=("embedding",),
            model_input="text" if self._takes_text else "tokens",
            embeddings=EmbeddingSpec(DIMENSIONS, shorter=True),
        )

    async def generate(self, request: Any, context: RequestContext) -> AsyncIterator[Any]:
        """Yield the answer, once all inputs are read."""
        batch = [self._token_ids(number, one, request) for number, one in enumerate(request["inputs"])]
        for tokens in batch:
            await self._read(len(tokens), context)
        dimensions = request.get("dimensions") or DIMENSIONS
        answer: EmbeddingAnswer = {
            "embeddings": [embedding(tokens, dimensions) for tokens in batch],
            "prompt_tokens": sum(map(len, batch)),
        }
        yield answer

    async def _read(self, tokens: int, context: RequestContext) -> None:
        work: Request = {"token_ids": [FIRST_BYTE], "stop_conditions": {"max_tokens": tokens}}
        steps = cast("AsyncGenerator[Chunk, None]", self._tokens.generate(work, context))
        async with aclosing(steps):
            async for _ in steps:
                pass

    def _token_ids(self, number: int, one: str | list[int], request: EmbeddingRequest) -> list[int]:
        """Return the tokens of an input: its bytes, if it is text.

        :raises InvalidRequestError: they are too many.
        """
        if not isinstance(one, str):
            return one
        tokens = [byte + FIRST_BYTE for byte in one.encode(errors="replace")]
        limit = request.get("truncate_prompt_tokens")
        if limit is not None:
            return tokens[: self._context_length if limit == -1 else limit]
        if len(tokens) > self._context_length:
            raise InvalidRequestError(
                f"input[{number}] has {len(tokens)} tokens; the model's context length is {self._context_length}"
            )
        return tokens

    async def abort(self, request_id: str) -> None:
        """Stop reading."""
        await self._tokens.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the pids of the engine that generates."""
        return self._tokens.processes()

    def canary_request(self) -> Any:
        """Return a request with one token."""
        return {"model": self._model_name, "inputs": [[FIRST_BYTE]]}

    def progress(self) -> int:
        """Return the number of steps taken."""
        return self._tokens.progress()

    async def check_health(self) -> None:
        """Raise EngineDeadError once the engine that generates is dead."""
        await self._tokens.check_health()

    async def shutdown(self, deadline: Deadline) -> None:
        """Shut the engine that generates down."""
        await self._tokens.shutdown(deadline)


def embedding(tokens: Sequence[int], dimensions: int = DIMENSIONS) -> list[float]:
    """Return the vector of an input: its length is 1, and other tokens or another order give another one."""
    vector = [0.0] * dimensions
    for position, token in enumerate(tokens, 1):
        spread = (token + 1) * _SPREAD % 2**32
        place = spread % DIMENSIONS
        if place < dimensions:
            vector[place] += 1.0 + spread / 2**32 / position
    vector[0] += 1.0  # an input may have left all the others 0
    norm = math.sqrt(sum(number * number for number in vector))
    return [number / norm for number in vector]
