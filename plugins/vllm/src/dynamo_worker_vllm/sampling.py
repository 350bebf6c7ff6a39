"""The translation table: every field of a Dynamo request, and what becomes of it in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.kv_hints import KvHintsEnvelope

from dynamo_worker import InvalidRequestError, translation
from dynamo_worker.translation import (
    FRONTEND,
    RequestTable,
    boolean,
    count,
    integer,
    length,
    logit_bias,
    number,
    tokens,
    unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


def _structured_outputs(_: str, value: Any) -> StructuredOutputsParams | None:
    constraint = translation.guided_decoding(value)
    try:
        return StructuredOutputsParams(**constraint) if constraint else None
    except Exception as error:
        raise InvalidRequestError(f"guided_decoding: {error}") from error


#: ``sampling_options``: the name in :class:`SamplingParams` and the reader.
SAMPLING: Final[translation.Fields] = {
    "n": ("n", integer),
    "presence_penalty": ("presence_penalty", number),
    "frequency_penalty": ("frequency_penalty", number),
    "repetition_penalty": ("repetition_penalty", number),
    "temperature": ("temperature", number),
    "top_p": ("top_p", number),
    "top_k": ("top_k", integer),
    "min_p": ("min_p", number),
    "seed": ("seed", integer),
    "best_of": ("", integer),  # only the same as n
    "use_beam_search": ("", unsupported(False)),
    "length_penalty": ("", unsupported(1)),  # of beam search
    "include_stop_str_in_output": FRONTEND,
    "guided_decoding": ("structured_outputs", _structured_outputs),
}

#: ``stop_conditions``. vLLM stops at tokens, the frontend at strings.
STOP: Final[translation.Fields] = {
    "max_tokens": ("max_tokens", integer),
    "min_tokens": ("min_tokens", integer),
    "stop": FRONTEND,
    "stop_token_ids": ("stop_token_ids", tokens),
    "stop_token_ids_visible": ("stop_token_ids", tokens),
    "stop_token_ids_hidden": ("stop_token_ids", tokens),  # the frontend hides them
    "ignore_eos": ("ignore_eos", boolean),
    "max_thinking_tokens": ("thinking_token_budget", length),
}

#: ``output_options``.
OUTPUT: Final[translation.Fields] = {
    "logprobs": ("logprobs", count),
    "prompt_logprobs": ("prompt_logprobs", count),
    "skip_special_tokens": FRONTEND,
    "formatted_prompt": FRONTEND,
    "return_tokens_as_token_ids": FRONTEND,
    "no_stop_trim": FRONTEND,
}

#: ``extra_args.sampling_options``: options of vLLM that Dynamo has no field for.
EXTRA: Final[translation.Fields] = {
    **SAMPLING,
    "allowed_token_ids": ("allowed_token_ids", tokens),
    "logprob_token_ids": ("logprob_token_ids", tokens),
    "logit_bias": ("logit_bias", logit_bias),
    "skip_reading_prefix_cache": ("skip_reading_prefix_cache", boolean),
    "stream_interval": ("stream_interval", integer),
}

#: ``require_reasoning`` is of SGLang's grammar backend: vLLM goes by its --reasoning-parser.
TABLE: Final = RequestTable(SAMPLING, STOP, OUTPUT, EXTRA, handled=frozenset({"require_reasoning", "kv_hint"}))


class SamplingTable:
    """Translates requests for one model."""

    def __init__(self, defaults: Mapping[str, Any], context_length: int) -> None:
        """Remember the model.

        :param defaults: what the model's generation configuration says, by the names of ``SamplingParams``.
        :param context_length: longest sequence in tokens.
        """
        self._defaults = dict(defaults)
        self._context_length = context_length

    def translate(self, request: Mapping[str, Any]) -> SamplingParams | None:
        """Return the sampling parameters of a request, or None if it asks for no token at all.

        :raises InvalidRequestError: a field is unknown, not supported or wrong; the message names it.
        """
        room = translation.room_for_answer(request, self._context_length)
        values = TABLE.read(request, self._defaults)
        limit = values.get("max_tokens")
        if limit == 0:
            return None
        values["max_tokens"] = room if limit is None else limit
        if values.get("logprob_token_ids"):
            values.pop("logprobs", None)  # vLLM derives the number from the list
        try:
            return SamplingParams(**values, detokenize=False, output_kind=RequestOutputKind.DELTA, skip_clone=True)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error


def kv_hints(request: Mapping[str, Any]) -> KvHintsEnvelope | None:
    """Return what the orchestrator wants done with the request's KV blocks.

    :raises InvalidRequestError: it is nothing that vLLM understands.
    """
    hint = request.get("kv_hint")
    if hint is None:
        return None
    try:
        return msgspec.convert(hint, KvHintsEnvelope)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"kv_hint: {error}") from error
