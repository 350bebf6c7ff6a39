"""The translation table: every field of a Dynamo request, and what becomes of it in SGLang."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sglang.srt.sampling.sampling_params import TOP_K_ALL, CustomParamValue, SamplingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit import translation
from dynamo_worker.kit.json_schema import check_size
from dynamo_worker.kit.translation import ModelTable, RequestTable, integer, logit_bias, mapping, string

if TYPE_CHECKING:
    from collections.abc import Mapping


def _top_k(name: str, value: Any) -> int:
    """Read how many of the likeliest tokens are left; 0 is all of them, which is -1 in SGLang.

    The scheduler has 32 bits for it, and ends if they do not do.
    """
    return min(integer(name, value), TOP_K_ALL) or -1


def _biases(name: str, value: Any) -> dict[str, float]:
    return {str(token): bias for token, bias in logit_bias(name, value).items()}


def _grammar(_: str, value: Any) -> dict[str, str]:
    """Return the one constraint on the text, by its name in SGLang."""
    constraint = translation.guided_decoding(value)
    if constraint.pop("whitespace_pattern", None) is not None:
        raise InvalidRequestError(
            "guided_decoding.whitespace_pattern is not supported by this engine: "
            "--constrained-json-whitespace-pattern sets it for all requests"
        )
    if len(constraint) > 1:
        raise InvalidRequestError(f"guided_decoding: only one of {', '.join(sorted(constraint))} can be given")
    for kind, given in constraint.items():
        if kind == "json":
            return {"json_schema": given if isinstance(given, str) else json.dumps(given)}
        if kind == "choice":
            return {"regex": "(" + "|".join(map(re.escape, given)) + ")"}
        return {{"grammar": "ebnf"}.get(kind, kind): given}
    return {}


def _stop_regex(name: str, value: Any) -> None:
    """Refuse it: SGLang's scheduler has Python match it, for which some patterns take longer than anybody waits.

    No other request gets a token meanwhile.
    """
    if value:
        raise InvalidRequestError(f"{name} is not supported by this engine; use `stop`, which is text")


def _custom_params(name: str, value: Any) -> dict[str, Any]:
    """Read what custom logit processors are told; the scheduler ends if it is of another type than this."""
    given = mapping(name, value)
    try:
        msgspec.convert(given, dict[str, CustomParamValue])
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{name}: {error}") from error
    return given


def _custom_logit_processor(name: str, value: Any) -> str:
    limits.GRAMMAR_CHARACTERS.check(name, len(string(name, value)))
    return str(value)


#: ``sampling_options``: the name in :class:`SamplingParams` and the reader.
SAMPLING: Final[translation.Fields] = {
    **translation.SAMPLING,
    "top_k": ("top_k", _top_k),
    "seed": ("sampling_seed", integer),
    "guided_decoding": ("guided_decoding", _grammar),
}

#: ``stop_conditions``.
STOP: Final[translation.Fields] = {
    **translation.STOP,
    "max_tokens": ("max_new_tokens", integer),
    "min_tokens": ("min_new_tokens", integer),
}

#: ``output_options``.
OUTPUT: Final = translation.OUTPUT

#: ``extra_args.sampling_options``: options of SGLang that Dynamo has no field for.
EXTRA: Final[translation.Fields] = {
    **SAMPLING,
    "logit_bias": ("logit_bias", _biases),
    "stop_regex": ("", _stop_regex),
    "stream_interval": ("stream_interval", integer),
    "custom_params": ("custom_params", _custom_params),
    "custom_logit_processor": ("custom_logit_processor", _custom_logit_processor),
}

TABLE: Final = RequestTable(
    SAMPLING, STOP, OUTPUT, EXTRA, handled=frozenset({"require_reasoning", "kv_hint", "bootstrap_info"})
)

#: What :meth:`SamplingTable.translate` puts beside the sampling parameters.
_OF_THE_REQUEST: Final[tuple[str, ...]] = ("max_thinking_tokens", "custom_logit_processor")


@dataclass
class Translated:
    """A request in SGLang's terms.

    :param sampling: the arguments of ``SamplingParams``.
    :param n: number of answers.
    :param options: further arguments of ``GenerateReqInput``.
    :param top: how many of the likeliest tokens are reported with each token; None if no log-probabilities are.
    :param prompt_top: the same for the tokens of the prompt.
    """

    sampling: dict[str, Any]
    n: int
    options: dict[str, Any]
    top: int | None
    prompt_top: int | None


class SamplingTable(ModelTable):
    """Translates requests for one model."""

    def __init__(
        self,
        defaults: Mapping[str, Any],
        context_length: int,
        vocabulary: int,
        *,
        deterministic: bool = False,
        custom_processors: bool = False,
    ) -> None:
        """Remember the model.

        :param defaults: what holds unless a request says otherwise, by the names of ``SamplingParams``.
        :param context_length: longest sequence in tokens.
        :param vocabulary: number of tokens there are.
        :param deterministic: whether the engine's answers depend on nothing but the request.
        :param custom_processors: whether requests may bring code that the engine runs.
        """
        super().__init__(TABLE, defaults, context_length)
        self._vocabulary = vocabulary
        self._deterministic = deterministic
        self._custom_processors = custom_processors

    def translate(self, request: Mapping[str, Any]) -> Translated | None:
        """Return the request in SGLang's terms, or None if it asks for no token at all.

        :raises InvalidRequestError: as :meth:`read` does, or SGLang refuses the parameters.
        """
        values = self.read(request)
        if values is None:
            return None
        values.update(values.pop("guided_decoding", {}))
        n = values.pop("n", 1)
        if values.get("custom_logit_processor") and not self._custom_processors:
            raise InvalidRequestError(
                "extra_args.sampling_options.custom_logit_processor is not supported by this engine without "
                "--enable-custom-logit-processor"
            )
        # The scheduler looks these up in a table of the vocabulary, and ends if they are not in it.
        stop_tokens = values.get("stop_token_ids")
        if stop_tokens:
            values["stop_token_ids"] = [token for token in stop_tokens if 0 <= token < self._vocabulary]
        top, prompt_top = values.pop("logprobs", None), values.pop("prompt_logprobs", None)
        options = {name: values.pop(name) for name in _OF_THE_REQUEST if name in values}
        if request.get("require_reasoning"):
            options["require_reasoning"] = True
        if request.get("kv_hint") is not None:
            check_size("kv_hint", request["kv_hint"])
            options["kv_hints"] = request["kv_hint"]
        if top is not None or prompt_top is not None:
            options["return_logprob"] = True
            options["top_logprobs_num"] = max(
                self._number("output_options.logprobs", top), self._number("output_options.prompt_logprobs", prompt_top)
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
        return Translated(values, n, options, top, prompt_top)

    def _number(self, name: str, top: int | None) -> int:
        if top is None:
            return 0
        number = self._vocabulary if top < 0 else top
        limits.LOGPROBS.check(name, number)
        return number
