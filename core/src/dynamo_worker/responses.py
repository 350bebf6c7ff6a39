"""What an engine answers: chunks, ``LLMEngineOutput`` of Dynamo 1.6.1.

The field names are those of the runtime's own serializer; inferred meanings are marked so. A chunk must be
JSON: keys are strings, numbers are finite. One value that JSON does not have makes the whole chunk fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003 - typing.get_type_hints looks them up
from typing import Any, TypedDict


class PromptTokensDetails(TypedDict, total=False):
    """What the tokens of a prompt were: ``PromptTokensDetails`` of Dynamo.

    :param cached_tokens: those found in the prefix cache.
    :param cache_write_tokens: those written to the prefix cache.
    :param text_tokens: those of text.
    :param image_tokens: those of images.
    :param audio_tokens: those of audio.
    """

    cached_tokens: int | None
    cache_write_tokens: int | None
    text_tokens: int | None
    image_tokens: int | None
    audio_tokens: int | None


class _Totals(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionUsage(_Totals, total=False):
    """Token counts of a finished answer: ``CompletionUsage`` of Dynamo, as in the OpenAI interface.

    :param prompt_tokens: tokens of the prompt.
    :param completion_tokens: tokens of the answer; of all answers so far if ``n`` is above 1.
    :param total_tokens: the sum of both.
    :param prompt_tokens_details: what the tokens of the prompt were; None if nothing is known.
    :param completion_tokens_details: the same for the answer, as in the OpenAI interface.
    """

    prompt_tokens_details: PromptTokensDetails | None
    completion_tokens_details: Mapping[str, Any] | None


class TopLogprob(TypedDict, total=False):
    """One of the likeliest tokens at a position of the answer: ``TopLogprob`` of Dynamo.

    :param rank: 1 is the likeliest.
    :param token_id: the token.
    :param token: its text; None lets the frontend decode it.
    :param logprob: natural logarithm of its probability. JSON has no infinity: use
        :data:`dynamo_worker.kit.chunks.LEAST_LOGPROB`.
    :param bytes: the UTF-8 bytes of the text, as numbers.
    """

    rank: int
    token_id: int
    token: str | None
    logprob: float
    bytes: Sequence[int] | None


class PromptLogprob(TypedDict, total=False):
    """One token at a position of the prompt: ``PromptLogprobEntry`` of Dynamo.

    :param logprob: natural logarithm of its probability.
    :param rank: 1 is the likeliest.
    :param decoded_token: its text.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None


class _Tokens(TypedDict):
    token_ids: Sequence[int]


class Chunk(_Tokens, total=False):
    """One piece of an answer: ``LLMEngineOutput`` of Dynamo.

    :param token_ids: the new tokens only; may be empty.
    :param index: the answer it belongs to, from 0 up to ``n`` - 1.
    :param finish_reason: in the last chunk of each answer only: ``eos``, ``length``, ``stop``, ``cancelled`` or
        ``content_filter``. Report an error by raising: ``error: MESSAGE`` and ``{"error": MESSAGE}`` exist, but such a
        request never migrates to another worker.
    :param stop_reason: the stop token, or the stop string, that ended the answer.
    :param completion_usage: token counts, in the last chunk.
    :param log_probs: log probability of each token of ``token_ids``; the same length.
    :param top_logprobs: the likeliest tokens for each token of ``token_ids``; the same length.
    :param cum_log_probs: sum of the log probabilities of the answer so far.
    :param engine_data: data for the client, under ``nvext.engine_data``. ``prompt_logprobs`` is a list with one object
        per token of the prompt, from token id (as a string) to :class:`PromptLogprob`; None for the first token.
    :param disaggregated_params: of a prefill worker, in its first chunk: what the decode worker needs, in the engine's
        own terms. Without it the router takes the prefill for failed; an empty object says that nothing is needed.
    :param encoder_result: of an encode worker: what the next worker needs, as a JSON object.
    :param tokens: the texts of the tokens, from an engine that detokenizes.
    :param text: the text of the new tokens, from an engine that detokenizes; the frontend does it otherwise.
    :param jailed_text: text held back while it may turn out to be a tool call (inferred).
    :param output_type: kind of output other than tokens (inferred).
    :param content_parts: ``image_url``, ``video_url`` or ``audio_url`` parts of the answer.
    :param extra_args: further data for the frontend (inferred).
    :param routing_data: data for the router (inferred).
    :param worker_trace_link: trace of the worker's part, for the frontend (inferred).
    """

    index: int
    finish_reason: str | Mapping[str, str] | None
    stop_reason: int | str | None
    completion_usage: CompletionUsage | None
    log_probs: Sequence[float] | None
    top_logprobs: Sequence[Sequence[TopLogprob]] | None
    cum_log_probs: float | None
    engine_data: Mapping[str, Any] | None
    disaggregated_params: Mapping[str, Any] | None
    encoder_result: Mapping[str, Any] | None
    tokens: Sequence[str | None] | None
    text: str | None
    jailed_text: str | None
    output_type: str | None
    content_parts: Sequence[Mapping[str, Any]] | None
    extra_args: Mapping[str, Any] | None
    routing_data: Mapping[str, Any] | None
    worker_trace_link: Mapping[str, Any] | None
