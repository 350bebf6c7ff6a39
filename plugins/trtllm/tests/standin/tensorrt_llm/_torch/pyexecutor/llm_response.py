"""What one iteration of the engine says about one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams


@dataclass(slots=True)
class OutputDelta:
    """New tokens of one sequence of a request.

    `logprobs` has one dict (token id -> Logprob) per new token; `prompt_logprobs` comes once, with the first delta.
    `finish_reason` is one of end_id, stop_words, length, timeout, cancelled, not_finished, or None while it runs;
    `stop_reason` is the stop id or stop string that ended it. `trim` counts the last tokens of the whole
    sequence (stop words) that the caller must cut off.
    """

    index: int
    new_tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] | None = None
    prompt_logprobs: list[dict[int, Any]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    trim: int = 0
    disaggregated_params: DisaggregatedParams | None = None


@dataclass(slots=True)
class LlmResponse:
    """One step of one request. `final` is set on the last response of a request, and on every error.

    `error` is a string for an error of this request alone, an exception for one that the proxy treats as fatal.
    """

    request_id: int
    error: str | BaseException | None = None
    outputs: list[OutputDelta] = field(default_factory=list)
    cached_tokens: int = 0
    decoding_iter: int = 0
    context_done: bool = False
    final: bool = False
