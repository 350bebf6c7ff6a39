"""The translation table: every field of a Dynamo request, and what becomes of it in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.kv_hints import KvHintsEnvelope

from dynamo_worker import InvalidRequestError, translation
from dynamo_worker.translation import ModelTable, RequestTable, boolean, integer, length, logit_bias, tokens

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
    **translation.SAMPLING,
    "guided_decoding": ("structured_outputs", _structured_outputs),
}

#: ``stop_conditions``.
STOP: Final[translation.Fields] = {**translation.STOP, "max_thinking_tokens": ("thinking_token_budget", length)}

#: ``output_options``.
OUTPUT: Final = translation.OUTPUT

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


class SamplingTable(ModelTable):
    """Translates requests for one model."""

    def __init__(self, defaults: Mapping[str, Any], context_length: int) -> None:
        super().__init__(TABLE, defaults, context_length)

    def translate(self, request: Mapping[str, Any]) -> SamplingParams | None:
        """Return the sampling parameters of a request, or None if it asks for no token at all.

        :raises InvalidRequestError: as :meth:`read` does, or vLLM refuses the parameters.
        """
        values = self.read(request)
        if values is None:
            return None
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
