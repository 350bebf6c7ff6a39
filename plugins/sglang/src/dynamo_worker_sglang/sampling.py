"""The translation table: the SGLang parameter for each field of a Dynamo request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sglang.srt.sampling.sampling_params import TOP_K_ALL, CustomParamValue, SamplingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields, guided_decoding, request_metadata, translation
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.translation import ModelTable, RequestTable

if TYPE_CHECKING:
    from collections.abc import Mapping


def _top_k(name: str, value: Any) -> int:
    """Read ``top_k``, where 0 means all tokens; SGLang uses -1.

    The scheduler uses 32 bits for it, and would exit on a larger number.
    """
    return min(fields.integer(name, value), TOP_K_ALL) or -1


def _biases(name: str, value: Any) -> dict[str, float]:
    return {str(token): bias for token, bias in fields.logit_bias(name, value).items()}


def _grammar(_: str, value: Any) -> dict[str, str]:
    """Return the only constraint on the text, by SGLang's name."""
    flag = "--constrained-json-whitespace-pattern sets it for all requests"
    names = {"json": "json_schema", "grammar": "ebnf"}
    return {names.get(kind, kind): given for kind, given in guided_decoding.read_one(value, whitespace=flag).items()}


def _stop_regex(name: str, value: Any) -> None:
    """Refuse the pattern: SGLang's scheduler would match it in Python, blocking all other requests.

    Some patterns take practically forever.
    """
    if value:
        raise InvalidRequestError(f"{name} is not supported by this engine; use `stop`, which is text")


def _custom_params(name: str, value: Any) -> dict[str, Any]:
    """Read the parameters of custom logit processors; the scheduler would exit on any other type."""
    given = fields.mapping(name, value)
    try:
        msgspec.convert(given, dict[str, CustomParamValue])
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{name}: {error}") from error
    return given


def _custom_logit_processor(name: str, value: Any) -> str:
    limits.GRAMMAR_CHARACTERS.check(name, len(fields.string(name, value)))
    return str(value)


TABLE: Final = RequestTable.of_engine(
    sampling={
        "top_k": ("top_k", _top_k),
        "seed": ("sampling_seed", fields.integer),
        "guided_decoding": ("guided_decoding", _grammar),
    },
    stop={
        "max_tokens": ("max_new_tokens", fields.integer),
        "min_tokens": ("min_new_tokens", fields.integer),
    },
    extra={
        "logit_bias": ("logit_bias", _biases),
        "stop_regex": ("", _stop_regex),
        "stream_interval": ("stream_interval", fields.integer),
        "custom_params": ("custom_params", _custom_params),
        "custom_logit_processor": ("custom_logit_processor", _custom_logit_processor),
    },
    handled=("require_reasoning", "kv_hint", "bootstrap_info"),
)

#: Parameters of ``GenerateReqInput`` rather than of ``SamplingParams``.
_REQUEST_OPTIONS: Final[tuple[str, ...]] = ("max_thinking_tokens", "custom_logit_processor")


@dataclass
class Translated(translation.Translated):
    """A request in SGLang's terms, with further arguments of ``GenerateReqInput``.

    :param sampling: the arguments of ``SamplingParams``.
    :param meeting: bootstrap address that a prefill worker sends before its first token; None if it sends none.
    """

    sampling: dict[str, Any]
    meeting: dict[str, Any] | None = None


class SamplingTable(ModelTable[Translated]):
    """Translates requests for one model into SGLang's terms."""

    def __init__(
        self,
        defaults: Mapping[str, Any],
        context_length: int,
        vocabulary: int,
        *,
        deterministic: bool = False,
        custom_processors: bool = False,
    ) -> None:
        """Take the model's properties.

        :param defaults: the model's generation configuration, by the names of ``SamplingParams``.
        :param context_length: longest sequence in tokens.
        :param vocabulary: number of tokens in the vocabulary.
        :param deterministic: whether the engine's answers depend only on the request.
        :param custom_processors: whether requests may contain code that the engine runs.
        """
        super().__init__(TABLE, defaults, context_length)
        self._vocabulary = vocabulary
        self._deterministic = deterministic
        self._custom_processors = custom_processors

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> Translated:
        """Return the request in SGLang's terms.

        :raises InvalidRequestError: SGLang rejects the parameters.
        """
        values.update(values.pop("guided_decoding", {}))
        n = values.pop("n", 1)
        if values.get("custom_logit_processor") and not self._custom_processors:
            raise InvalidRequestError(
                "extra_args.sampling_options.custom_logit_processor is not supported by this engine without "
                "--enable-custom-logit-processor"
            )
        # The scheduler uses these as indexes into the vocabulary, and would exit on others.
        stop_tokens = values.get("stop_token_ids")
        if stop_tokens:
            values["stop_token_ids"] = [token for token in stop_tokens if 0 <= token < self._vocabulary]
        top, prompt_top = values.pop("logprobs", None), values.pop("prompt_logprobs", None)
        options = {name: values.pop(name) for name in _REQUEST_OPTIONS if name in values}
        if request.get("require_reasoning"):
            options["require_reasoning"] = True
        hint = request_metadata.kv_hint(request)
        if hint is not None:
            options["kv_hints"] = hint
        if top is not None or prompt_top is not None:
            options["return_logprob"] = True
            options["top_logprobs_num"] = max(
                fields.logprobs_per_token("output_options.logprobs", top or 0, self._vocabulary),
                fields.logprobs_per_token("output_options.prompt_logprobs", prompt_top or 0, self._vocabulary),
            )
            options["logprob_start_len"] = -1 if prompt_top is None else 0
        try:
            checked = SamplingParams(**values)
            checked.verify(self._vocabulary)
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error
        if checked.sampling_seed is not None and checked.top_k != 1 and not self._deterministic:
            raise InvalidRequestError(
                "sampling_options.seed is not supported by this engine without --enable-deterministic-inference"
            )
        return Translated(n, options, top, prompt_top, values)
