"""Parts of a chunk (``LLMEngineOutput`` of Dynamo 1.6.1) that all engines build the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm.exceptions import Disconnected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_worker.responses import Chunk, CompletionUsage, PromptLogprob, TopLogprob

#: Stands for a log-probability of minus infinity, which JSON cannot express; vLLM's own server uses the same value.
LEAST_LOGPROB: Final = -9999.0


def finite(value: float) -> float:
    """Return a number that JSON can carry."""
    return float(value) if math.isfinite(value) else LEAST_LOGPROB


def no_tokens() -> Chunk:
    """Return the only chunk of the answer to a request for no tokens."""
    return {"token_ids": [], "index": 0, "finish_reason": "length"}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> CompletionUsage:
    """Return ``completion_usage``: the token counts of a finished request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens} if cached_tokens else None,
    }


def top_logprob(token: int, logprob: float, rank: int, text: str | None) -> TopLogprob:
    """Return one alternative of ``top_logprobs``.

    :param text: the token's text; None without a tokenizer.
    """
    return {
        "rank": rank,
        "token_id": token,
        "token": text,
        "logprob": finite(logprob),
        "bytes": None if text is None else list(text.encode(errors="replace")),
    }


def token_decoder(tokenizer: Any) -> Callable[[int], str | None]:
    """Return the function that returns the text of a token.

    :param tokenizer: a Hugging Face tokenizer; without one (None) no token has a text.
    """
    if tokenizer is None:
        return no_text
    return lambda token: str(tokenizer.decode([token]))


def no_text(_: int) -> None:
    """Return None: the decoder of an engine without a tokenizer."""


def add_logprobs(
    chunk: Chunk,
    positions: Sequence[Any],
    top: int | None,
    decode: Callable[[int], str | None],
) -> None:
    """Add the log-probabilities of a chunk's tokens; nothing if they do not match the tokens.

    :param positions: for each token, a mapping from token ids to objects with ``logprob`` and ``rank``, as vLLM and
        TensorRT-LLM have them. It contains the chosen token even if that is not among the likeliest.
    :param top: number of likeliest tokens to report; None for all.
    :param decode: returns the text of a token whose object has no ``decoded_token``.
    """
    tokens = chunk["token_ids"]
    chosen, likeliest = [], []
    for token, position in zip(tokens, positions, strict=False):
        entry = position.get(token) if isinstance(position, Mapping) else None
        if entry is None:
            return
        chosen.append(finite(entry.logprob))
        likeliest.append(
            [
                top_logprob(other, value.logprob, value.rank or 0, _text(other, value, decode))
                for other, value in position.items()
                if top is None or (value.rank or 0) <= top
            ]
        )
    if len(chosen) == len(tokens):
        chunk["log_probs"] = chosen
        chunk["top_logprobs"] = likeliest


def prompt_logprobs(
    positions: Iterable[Any], decode: Callable[[int], str | None]
) -> list[dict[str, PromptLogprob] | None]:
    """Return ``engine_data.prompt_logprobs`` from the same kind of mappings; None for a token without one."""
    return [
        {
            str(token): prompt_logprob(value.logprob, value.rank, _text(token, value, decode))
            for token, value in position.items()
        }
        if isinstance(position, Mapping)
        else None
        for position in positions
    ]


def _text(token: int, value: Any, decode: Callable[[int], str | None]) -> str | None:
    text: str | None = getattr(value, "decoded_token", None)
    return decode(token) if text is None else text


def prompt_logprob(logprob: float, rank: int | None, text: str | None) -> PromptLogprob:
    """Return one token's entry of ``engine_data.prompt_logprobs``, which is keyed by the token id as a string."""
    entry: PromptLogprob = {"logprob": finite(logprob)}
    if rank is not None:
        entry["rank"] = rank
    if text is not None:
        entry["decoded_token"] = text
    return entry


class ChunkBuilder:
    """Builds the chunks of all answers to one request, and counts their tokens.

    :ivar tokens: number of tokens in the chunks.
    """

    def __init__(
        self,
        engine: str,
        finish_reasons: Mapping[str, str],
        *,
        prompt_tokens: int,
        top: int | None = None,
        prompt_top: int | None = None,
        decode: Callable[[int], str | None] = no_text,
    ) -> None:
        """Start a request.

        :param engine: its name in messages.
        :param finish_reasons: Dynamo's names of the engine's finish reasons.
        :param prompt_tokens: number of tokens in the prompt.
        :param top: number of likeliest tokens reported with each; None for no log-probabilities.
        :param prompt_top: the same for the prompt.
        :param decode: returns the text of a token.
        """
        self.tokens = 0
        self._engine, self._finish_reasons = engine, finish_reasons
        self._prompt_tokens = prompt_tokens
        self._top, self._prompt_top = top, prompt_top
        self._decode = decode

    def chunk(self, index: int, tokens: list[int], logprobs: Sequence[Any]) -> Chunk:
        """Return the chunk of new tokens of one answer.

        :param logprobs: the likeliest tokens at each position, as :func:`add_logprobs` takes them.
        """
        self.tokens += len(tokens)
        chunk: Chunk = {"token_ids": tokens, "index": index}
        if self._top is not None:
            add_logprobs(chunk, logprobs, self._top, self._decode)
        return chunk

    def finish(
        self, chunk: Chunk, reason: str, stop_reason: Any, cached_tokens: int | None, prompt: Iterable[Any]
    ) -> None:
        """Make a chunk the last one of its answer. Nobody reads the tokens of a cancelled one.

        :param reason: the engine's finish reason.
        :param stop_reason: the token that ended the answer; None without one.
        :param cached_tokens: tokens of the prompt that were in the KV cache.
        :param prompt: the likeliest tokens at each position of the prompt, as :func:`prompt_logprobs` takes them.
        :raises Disconnected: the engine could not finish the answer, but another worker can.
        """
        name = self._finish_reasons.get(reason)
        if name is None:
            # Not EngineShutdown, which takes the whole worker out of the frontends' rotation for 5 s (measured).
            raise Disconnected(f"{self._engine} ended the request: {reason}")
        chunk["finish_reason"] = name
        if name == "cancelled":
            chunk["token_ids"] = []
        if stop_reason is not None:
            chunk["stop_reason"] = stop_reason
        chunk["completion_usage"] = usage(self._prompt_tokens, self.tokens, cached_tokens)
        if self._prompt_top is not None:
            chunk["engine_data"] = {"prompt_logprobs": prompt_logprobs(prompt, self._decode)}
