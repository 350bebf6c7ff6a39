"""The translation table: the TensorRT-LLM parameter for each field of a Dynamo request."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tensorrt_llm.llmapi import ConversationParams
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields, guided_decoding, request_metadata
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.translation import ModelTable, RequestTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    from dynamo_worker.kit.huggingface import ModelFiles

#: What an answer ends with that no end-of-sequence token ends.
_NO_TOKEN: Final = -1
_LARGEST_FLOAT: Final = 3e38


def _within(least: float, most: float = _LARGEST_FLOAT) -> fields.Reader:
    """Return the reader of a number in a range; TensorRT-LLM's ranks use 32 bits for it."""

    def read(name: str, value: Any) -> float:
        number = fields.number(name, value)
        if not least <= number <= most:
            raise fields.refusal(name, f"a number from {least:g} to {most:g}", value)
        return number

    return read


def _top_k(name: str, value: Any) -> int:
    """Read ``top_k``, where -1 means all tokens; TensorRT-LLM uses 0."""
    return 0 if value == -1 else fields.token_count(name, value)


def _seed(name: str, value: Any) -> int:
    """Read the seed; TensorRT-LLM has no negative ones."""
    return fields.integer(name, value) % 2**63


def _guide(_: str, value: Any) -> GuidedDecodingParams | None:
    """Return the only constraint on the text."""
    constraint = guided_decoding.read(value)
    if constraint.pop("whitespace_pattern", None) is not None:
        raise InvalidRequestError("guided_decoding.whitespace_pattern is not supported by this engine")
    if len(constraint) > 1:
        raise InvalidRequestError(f"guided_decoding: only one of {', '.join(sorted(constraint))} can be given")
    for kind, given in constraint.items():
        if kind == "json":
            return GuidedDecodingParams(json=given if isinstance(given, str) else json.dumps(given))
        if kind == "choice":
            return GuidedDecodingParams(regex="(" + "|".join(map(re.escape, given)) + ")")
        return GuidedDecodingParams(**{kind: given})
    return None


TABLE: Final = RequestTable.of_engine(
    sampling={
        "presence_penalty": ("presence_penalty", _within(-_LARGEST_FLOAT)),
        "frequency_penalty": ("frequency_penalty", _within(-_LARGEST_FLOAT)),
        "repetition_penalty": ("repetition_penalty", _within(1e-3)),
        "temperature": ("temperature", _within(0)),
        "top_p": ("top_p", _within(0, 1)),
        "top_k": ("top_k", _top_k),
        "min_p": ("min_p", _within(0, 1)),
        "seed": ("seed", _seed),
        "guided_decoding": ("guided_decoding", _guide),
    },
    stop={
        "max_tokens": ("max_tokens", fields.token_count),
        "min_tokens": ("min_tokens", fields.token_count),
        "max_thinking_tokens": ("", fields.unsupported()),
    },
    handled=("require_reasoning",),  # for SGLang's grammar backend
)


@dataclass
class Translated:
    """A request in TensorRT-LLM's terms.

    :param params: the sampling parameters, made for this request alone: TensorRT-LLM changes them.
    :param n: number of answers.
    :param options: further arguments of ``LLM.generate_async``.
    :param top: number of likeliest tokens reported with each token; None for no log-probabilities.
    :param prompt_top: the same for the tokens of the prompt.
    """

    params: SamplingParams
    n: int
    options: dict[str, Any]
    top: int | None
    prompt_top: int | None


class SamplingTable(ModelTable[Translated]):
    """Translates requests for one model into TensorRT-LLM's terms."""

    def __init__(self, model: ModelFiles, args: TorchLlmArgs) -> None:
        """Take the model's properties and the engine's settings."""
        super().__init__(TABLE, model.sampling, model.context_length)
        self._vocabulary = model.vocab_size
        self._end_ids = model.end_ids
        self._guides = args.guided_decoding_backend
        self._chooses_rank = args.enable_attention_dp
        self._keeps_sessions = bool(getattr(args.attention_dp_config, "kv_cache_routing_conversation_affinity", False))

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> Translated:
        """Return the request in TensorRT-LLM's terms.

        :raises InvalidRequestError: TensorRT-LLM rejects the parameters.
        """
        tops = {name: values.pop(name, None) for name in ("logprobs", "prompt_logprobs")}
        numbers = {name: self._number(f"output_options.{name}", top) for name, top in tops.items() if top is not None}
        self._check_guide(values.get("guided_decoding"))
        # No token beyond the vocabulary is ever generated, and the ranks have 32 bits for each.
        stop = [token for token in values.pop("stop_token_ids", ()) if 0 <= token < self._vocabulary]
        # TensorRT-LLM's own `ignore_eos` would ignore the stop tokens as well.
        end, *more = (not values.pop("ignore_eos", False) and self._end_ids) or (_NO_TOKEN,)
        try:
            params = SamplingParams(
                **values,
                **numbers,
                end_id=end,
                pad_id=next(iter(self._end_ids), 0),
                stop_token_ids=[*more, *stop] or None,
                # Otherwise the last step takes tokens back that are sent; the frontend hides those of `stop`.
                include_stop_str_in_output=True,
                detokenize=False,
            )
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error
        return Translated(
            params, params.n, self._options(request), top=tops["logprobs"], prompt_top=tops["prompt_logprobs"]
        )

    def _number(self, name: str, top: int) -> int:
        number = self._vocabulary if top < 0 else top
        limits.LOGPROBS.check(name, number)
        return max(1, number)  # TensorRT-LLM takes 0 for none

    def _check_guide(self, guide: GuidedDecodingParams | None) -> None:
        backend = "xgrammar" if guide is not None and guide.structural_tag else self._guides
        if guide is not None and (self._guides is None or self._guides != backend):
            raise InvalidRequestError(
                "sampling_options.guided_decoding is not supported by this engine without --guided-decoding-backend "
                f"{backend or 'xgrammar'}"
            )

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request's priority, cache salt, rank or session as arguments of ``LLM.generate_async``."""
        options: dict[str, Any] = {"cache_salt": request_metadata.cache_salt(request)}
        priority, rank = request_metadata.priority(request), request_metadata.dp_rank(request)
        session = request_metadata.session_id(request)
        if priority is not None:
            # From any integer to 0…1; Dynamo's 0 is TensorRT-LLM's 0.5.
            options["priority"] = (1 + priority / (1 + abs(priority))) / 2
        if self._keeps_sessions and session is not None:
            options["conversation_params"] = ConversationParams(conversation_id=session)
        elif self._chooses_rank and not self._keeps_sessions and rank is not None:
            options["scheduling_params"] = SchedulingParams(attention_dp_rank=rank, attention_dp_relax=False)
        return options
