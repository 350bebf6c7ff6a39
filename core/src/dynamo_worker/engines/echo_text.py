"""The echo engine that takes and gives text (``--text``): it tokenizes, stops at stop strings and counts by itself."""

from __future__ import annotations

import codecs
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from dynamo_worker.engine import Engine
from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import fields
from dynamo_worker.kit.canary import text_canary
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
from dynamo_worker.kit.text import (
    StopStrings,
    TextChunks,
    is_chat,
    last_message,
    max_tokens,
    refuse_others,
    stop_strings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Chunk, EngineInfo, RequestContext
    from dynamo_worker.requests import Request
    from dynamo_worker.text import TextRequest

#: The token of the byte 0; those before are special.
FIRST_BYTE: Final = 3
#: What changes nothing, as the engine samples nothing; each with its reader.
_IGNORED: Final = {
    **dict.fromkeys(("temperature", "top_p", "presence_penalty", "frequency_penalty"), fields.number),
    "seed": fields.integer,
    "n": fields.answer_count,
}
_HONOURED: Final = frozenset({*_IGNORED, "max_tokens", "max_completion_tokens", "stop"})


class TokenEngine(Engine, Protocol):
    """The echo engine that generates."""

    def progress(self) -> int:
        """Return the number of steps taken."""

    async def check_health(self) -> None:
        """Raise EngineDeadError once it is dead."""

    async def shutdown(self, deadline: Deadline) -> None:
        """Shut it down."""


class EchoTextEngine(EngineLifecycle):
    """Turns text into the tokens of another echo engine, and its answers into text.

    :param tokens: the engine that generates.
    :param model_name: the name clients ask for.
    """

    def __init__(self, tokens: TokenEngine, model_name: str) -> None:
        self._tokens = tokens
        self._model_name = model_name
        self._context_length = 0

    async def start(self, worker_id: int) -> EngineInfo:
        """Start the engine that generates."""
        info = await self._tokens.start(worker_id)
        self._context_length = info.context_length or 0
        return replace(info, model_input="text")

    async def generate(self, request: Any, context: RequestContext) -> AsyncIterator[Any]:
        """Yield the answer, a character or more a chunk, and the token counts if the client wants them."""
        prompt = _prompt(request, self._context_length)
        refuse_others(request, _HONOURED)
        for name, reader in _IGNORED.items():
            if request.get(name) is not None:
                reader(name, request[name])
        if (request.get("n") or 1) > 1:
            raise InvalidRequestError("the echo engine makes only one answer: n must be 1")
        stop, chunks = StopStrings(stop_strings(request)), TextChunks(request, context)
        limit = max_tokens(request)
        inner: Request = {"token_ids": prompt, "stop_conditions": {"max_tokens": limit}}
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        made = 0
        answer = cast("AsyncGenerator[Chunk, None]", self._tokens.generate(inner, context))
        async with aclosing(answer):
            async for chunk in answer:
                tokens = chunk["token_ids"]
                made += len(tokens)
                reason = chunk.get("finish_reason")
                text = decoder.decode(
                    bytes(token - FIRST_BYTE for token in tokens if token >= FIRST_BYTE), bool(reason)
                )
                text = stop.take(text)
                if stop.stopped:
                    reason = "stop"
                elif reason is not None:
                    text += stop.rest()
                if text or reason is not None:
                    yield chunks.chunk(text, finish_reason=reason if isinstance(reason, str) else None)
                if reason is not None:
                    break
        if stop.stopped:
            await self._tokens.abort(context.id())
        if chunks.wants_usage:
            yield chunks.usage(len(prompt), made)

    async def abort(self, request_id: str) -> None:
        """Stop the generation."""
        await self._tokens.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the pids of the engine that generates."""
        return self._tokens.processes()

    def canary_request(self) -> TextRequest:
        """Return a request for one token."""
        return text_canary(self._model_name)

    def progress(self) -> int:
        """Return the number of steps taken."""
        return self._tokens.progress()

    async def check_health(self) -> None:
        """Raise EngineDeadError once the engine that generates is dead."""
        await self._tokens.check_health()

    async def shutdown(self, deadline: Deadline) -> None:
        """Shut the engine that generates down."""
        await self._tokens.shutdown(deadline)


def _prompt(request: TextRequest, context_length: int) -> list[int]:
    """Return the tokens of the prompt: its bytes.

    :raises InvalidRequestError: there are none, or certainly too many; those are not even made.
    """
    if is_chat(request):
        text = last_message(request)
    elif isinstance(request["prompt"], str):
        text = request["prompt"]
    else:
        return list(request["prompt"])
    if not text:
        raise InvalidRequestError("there is nothing to echo: the prompt is empty")
    if len(text) > context_length:
        raise InvalidRequestError(
            f"the prompt has {len(text)} characters; the model's context length is {context_length}"
        )
    return [byte + FIRST_BYTE for byte in text.encode(errors="replace")]
