"""The translation table: the vLLM parameter for each field of a Dynamo request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.kv_hints import KvHintsEnvelope

from dynamo_worker import InvalidRequestError
from dynamo_worker.errors import describe
from dynamo_worker.kit import fields, guided_decoding, image_requests, request_metadata
from dynamo_worker.kit.translation import ModelTable, RequestTable

if TYPE_CHECKING:
    from collections.abc import Mapping


def _structured_outputs(_: str, value: Any) -> StructuredOutputsParams | None:
    constraint = guided_decoding.read(value)
    try:
        return StructuredOutputsParams(**constraint) if constraint else None
    except Exception as error:
        raise InvalidRequestError(f"guided_decoding: {error}") from error


TABLE: Final = RequestTable.of_engine(
    sampling={"guided_decoding": ("structured_outputs", _structured_outputs)},
    stop={"max_thinking_tokens": ("thinking_token_budget", fields.token_count)},
    extra={
        "allowed_token_ids": ("allowed_token_ids", fields.allowed_token_ids),
        "logprob_token_ids": ("logprob_token_ids", fields.token_ids),
        "logit_bias": ("logit_bias", fields.logit_bias),
        "skip_reading_prefix_cache": ("skip_reading_prefix_cache", fields.boolean),
        "stream_interval": ("stream_interval", fields.integer),
    },
    # ``require_reasoning`` is for SGLang's grammar backend; vLLM goes by its --reasoning-parser.
    handled=("require_reasoning", "kv_hint", *image_requests.FIELDS),
)


class GuidedParams(SamplingParams):  # type: ignore[misc]
    """Sampling parameters with a constraint on the text.

    vLLM verifies parameters on the event loop when it accepts a request, and for that compiles the constraint, which
    may take seconds: 0.4 s for a schema of 32 nested objects with 100 properties each (measured), 5 s until it gives up
    on a regular expression. :meth:`verify_guide` does that part in a thread; :meth:`verify` then skips it.
    """

    def verify_guide(self, model_config: Any, structured_outputs_config: Any, tokenizer: Any) -> None:
        """Compile the constraint.

        :raises VLLMClientError: vLLM rejects it.
        :raises InvalidRequestError: vLLM fails on it.
        """
        try:
            self._validate_structured_outputs(model_config, structured_outputs_config, tokenizer)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:  # wrong types, or nested too deeply
            raise InvalidRequestError(f"guided_decoding is invalid: {describe(error)}") from error

    def verify(
        self, model_config: Any, speculative_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        """Verify what has not been verified yet."""
        verified = self.structured_outputs._backend is not None  # noqa: SLF001 - vLLM's own mark
        super().verify(model_config, speculative_config, None if verified else structured_outputs_config, tokenizer)


class SamplingTable(ModelTable[SamplingParams]):
    """Translates requests for one model into vLLM's sampling parameters."""

    def __init__(self, defaults: Mapping[str, Any], context_length: int) -> None:
        super().__init__(TABLE, defaults, context_length)

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> SamplingParams:  # noqa: ARG002
        """Return the sampling parameters.

        :raises InvalidRequestError: vLLM rejects them.
        """
        if values.get("logprob_token_ids"):
            values.pop("logprobs", None)  # vLLM derives the number from the list
        kind = SamplingParams if values.get("structured_outputs") is None else GuidedParams
        try:
            return kind(**values, detokenize=False, output_kind=RequestOutputKind.DELTA, skip_clone=True)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error


def kv_hints(request: Mapping[str, Any]) -> KvHintsEnvelope | None:
    """Return the orchestrator's instructions for the request's KV blocks.

    :raises InvalidRequestError: vLLM does not understand them.
    """
    hint = request_metadata.kv_hint(request)
    try:
        return None if hint is None else msgspec.convert(hint, KvHintsEnvelope)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"kv_hint: {error}") from error


def reasoning(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the frontend's information about the prompt's reasoning part as arguments of ``AsyncLLM.add_request``.

    Anything of the wrong type, or an argument that vLLM's parsers lack, would end the engine's process.

    :raises InvalidRequestError: the frontend never sends this.
    """
    extra = fields.section(request, "extra_args")
    ended, arguments = extra.get("reasoning_ended"), extra.get("reasoning_parser_kwargs")
    if ended is not None:
        ended = fields.boolean("extra_args.reasoning_ended", ended)
    if arguments is not None:
        name = "extra_args.reasoning_parser_kwargs"
        arguments = fields.mapping(name, arguments)
        if not arguments.keys() <= {"chat_template_kwargs"}:
            raise fields.refusal(name, "an object with no key but chat_template_kwargs", arguments)
        if arguments.get("chat_template_kwargs") is not None:
            fields.mapping(f"{name}.chat_template_kwargs", arguments["chat_template_kwargs"])
    return {"reasoning_ended": ended, "reasoning_parser_kwargs": arguments}
