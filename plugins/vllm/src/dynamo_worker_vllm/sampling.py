"""The translation table: every field of a Dynamo request, and what becomes of it in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.kv_hints import KvHintsEnvelope

from dynamo_worker import InvalidRequestError
from dynamo_worker.errors import describe
from dynamo_worker.kit import translation
from dynamo_worker.kit.json_schema import check_size
from dynamo_worker.kit.translation import (
    ModelTable,
    RequestTable,
    allowed_tokens,
    boolean,
    integer,
    length,
    logit_bias,
    mapping,
    refusal,
    tokens,
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
    "allowed_token_ids": ("allowed_token_ids", allowed_tokens),
    "logprob_token_ids": ("logprob_token_ids", tokens),
    "logit_bias": ("logit_bias", logit_bias),
    "skip_reading_prefix_cache": ("skip_reading_prefix_cache", boolean),
    "stream_interval": ("stream_interval", integer),
}

#: ``require_reasoning`` is of SGLang's grammar backend: vLLM goes by its --reasoning-parser.
TABLE: Final = RequestTable(SAMPLING, STOP, OUTPUT, EXTRA, handled=frozenset({"require_reasoning", "kv_hint"}))


class GuidedParams(SamplingParams):  # type: ignore[misc]
    """Sampling parameters with a constraint on the text.

    vLLM verifies them where it takes a request, on the event loop. To do so it compiles the constraint, which takes up
    to seconds: 0.4 s for a schema of 32 nested objects with 100 properties each (measured), 5 s until it gives up on a
    regular expression. :meth:`verify_guide` does that part, in a thread; :meth:`verify` does not do it again.
    """

    def verify_guide(self, model_config: Any, structured_outputs_config: Any, tokenizer: Any) -> None:
        """Compile the constraint.

        :raises VLLMClientError: vLLM refuses it.
        :raises InvalidRequestError: vLLM stumbles over it.
        """
        try:
            self._validate_structured_outputs(model_config, structured_outputs_config, tokenizer)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:  # parts of the wrong types, or too deep
            raise InvalidRequestError(f"guided_decoding is wrong: {describe(error)}") from error

    def verify(
        self, model_config: Any, speculative_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        """Verify everything that has not been verified."""
        verified = self.structured_outputs._backend is not None  # noqa: SLF001 - vLLM's own mark
        super().verify(model_config, speculative_config, None if verified else structured_outputs_config, tokenizer)


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
        kind = SamplingParams if values.get("structured_outputs") is None else GuidedParams
        try:
            return kind(**values, detokenize=False, output_kind=RequestOutputKind.DELTA, skip_clone=True)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error


def kv_hints(request: Mapping[str, Any]) -> KvHintsEnvelope | None:
    """Return what the orchestrator wants done with the request's KV blocks.

    :raises InvalidRequestError: it is nothing that vLLM understands.
    """
    hint = request.get("kv_hint")
    if hint is None:
        return None
    check_size("kv_hint", hint)
    try:
        return msgspec.convert(hint, KvHintsEnvelope)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"kv_hint: {error}") from error


def reasoning(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the frontend knows of the prompt's reasoning, as arguments of ``AsyncLLM.add_request``.

    The engine's process reads it: what has another type, or is an argument that its parsers do not have, would end it.

    :raises InvalidRequestError: it is nothing that the frontend sends.
    """
    extra = translation.section(request, "extra_args")
    ended, arguments = extra.get("reasoning_ended"), extra.get("reasoning_parser_kwargs")
    if ended is not None:
        ended = boolean("extra_args.reasoning_ended", ended)
    if arguments is not None:
        name = "extra_args.reasoning_parser_kwargs"
        arguments = mapping(name, arguments)
        if not arguments.keys() <= {"chat_template_kwargs"}:
            raise refusal(name, "an object with chat_template_kwargs and nothing else", arguments)
        if arguments.get("chat_template_kwargs") is not None:
            mapping(f"{name}.chat_template_kwargs", arguments["chat_template_kwargs"])
    return {"reasoning_ended": ended, "reasoning_parser_kwargs": arguments}
