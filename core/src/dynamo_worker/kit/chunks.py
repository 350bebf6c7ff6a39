"""Parts of a chunk (``LLMEngineOutput`` of Dynamo 1.6.1) that engines have to build alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from dynamo_worker.responses import Chunk, CompletionUsage, PromptLogprob, TopLogprob

#: Stands for a log-probability of minus infinity, as in vLLM's own server: JSON has no word for it.
LEAST_LOGPROB: Final = -9999.0


def finite(value: float) -> float:
    """Return a number that JSON can carry."""
    return float(value) if math.isfinite(value) else LEAST_LOGPROB


def nothing() -> Chunk:
    """Return the only chunk of an answer to a request that asks for no token."""
    return {"token_ids": [], "index": 0, "finish_reason": "length"}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> CompletionUsage:
    """Return ``completion_usage``: the numbers of tokens of a finished request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens} if cached_tokens else None,
    }


def top_logprob(token: int, logprob: float, rank: int, text: str | None) -> TopLogprob:
    """Return one alternative of ``top_logprobs``.

    :param text: of the token; None where there is no tokenizer.
    """
    return {
        "rank": rank,
        "token_id": token,
        "token": text,
        "logprob": finite(logprob),
        "bytes": None if text is None else list(text.encode(errors="replace")),
    }


def prompt_logprob(logprob: float, rank: int | None, text: str | None) -> PromptLogprob:
    """Return one token's entry of ``engine_data.prompt_logprobs``, which is keyed by the token id as a string."""
    entry: PromptLogprob = {"logprob": finite(logprob)}
    if rank is not None:
        entry["rank"] = rank
    if text is not None:
        entry["decoded_token"] = text
    return entry
