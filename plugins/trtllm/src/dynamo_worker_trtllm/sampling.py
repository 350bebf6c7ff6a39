"""The translation table: the TensorRT-LLM parameter for each field of a Dynamo request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tensorrt_llm.llmapi import ConversationParams
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields, guided_decoding, request_metadata, translation
from dynamo_worker.kit.translation import ModelTable, RequestTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    from dynamo_worker.kit.huggingface import ModelFiles

#: The end token of an answer that none ends.
_NO_TOKEN: Final = -1
#: Largest number: the ranks have 32 bits for each.
_MOST: Final = 3e38


def _top_k(name: str, value: Any) -> int:
    """Read ``top_k``, where -1 means all tokens; TensorRT-LLM uses 0."""
    return 0 if value == -1 else fields.token_count(name, value)


def _guide(_: str, value: Any) -> GuidedDecodingParams | None:
    constraint = guided_decoding.read_one(value)
    return GuidedDecodingParams(**constraint) if constraint else None


TABLE: Final = RequestTable.of_engine(
    sampling={
        "presence_penalty": ("presence_penalty", fields.number_within(-_MOST, _MOST)),
        "frequency_penalty": ("frequency_penalty", fields.number_within(-_MOST, _MOST)),
        "repetition_penalty": ("repetition_penalty", fields.number_within(1e-3, _MOST)),
        "temperature": ("temperature", fields.number_within(0, _MOST)),
        "top_p": ("top_p", fields.number_within(1e-6, 1)),
        "top_k": ("top_k", _top_k),
        "min_p": ("min_p", fields.number_within(0, 1)),
        "seed": ("seed", lambda name, value: fields.integer(name, value) % 2**63),  # there are no negative ones
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
class Translated(translation.Translated):
    """A request in TensorRT-LLM's terms, with further arguments of ``LLM.generate_async``.

    :param params: the sampling parameters, made for this request alone: TensorRT-LLM changes them.
    """

    params: SamplingParams


class SamplingTable(ModelTable[Translated]):
    """Translates requests for one model into TensorRT-LLM's terms."""

    def __init__(self, model: ModelFiles, args: TorchLlmArgs) -> None:
        """Take the model's properties and the engine's settings."""
        super().__init__(TABLE, model.sampling, model.context_length)
        self._vocabulary, self._end_ids = model.vocab_size, model.end_ids
        self._guides, self._ranks = args.guided_decoding_backend, args.enable_attention_dp
        # TensorRT-LLM keeps the requests of a session on one rank, and chooses that itself.
        self._sessions = getattr(args.attention_dp_config, "kv_cache_routing_conversation_affinity", None) is True

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> Translated:
        """Return the request in TensorRT-LLM's terms.

        :raises InvalidRequestError: TensorRT-LLM rejects the parameters.
        """
        top, prompt_top = values.pop("logprobs", None), values.pop("prompt_logprobs", None)
        self._check_guide(values.get("guided_decoding"))
        # No token beyond the vocabulary is ever generated, and the ranks have 32 bits for each.
        stop = [token for token in values.pop("stop_token_ids", ()) if 0 <= token < self._vocabulary]
        # TensorRT-LLM's own `ignore_eos` would ignore the stop tokens as well.
        end, *more = (not values.pop("ignore_eos", False) and self._end_ids) or (_NO_TOKEN,)
        try:
            params = SamplingParams(
                **values,
                logprobs=self._number("output_options.logprobs", top),
                prompt_logprobs=self._number("output_options.prompt_logprobs", prompt_top),
                end_id=end,
                pad_id=next(iter(self._end_ids), 0),
                stop_token_ids=[*more, *stop] or None,
                # Otherwise the last step takes back tokens that are sent; the frontend hides those that it should.
                include_stop_str_in_output=True,
                detokenize=False,
            )
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error
        return Translated(params.n, self._options(request), top, prompt_top, params)

    def _number(self, name: str, count: int | None) -> int | None:
        # TensorRT-LLM takes 0 for none.
        return None if count is None else max(1, fields.logprobs_per_token(name, count, self._vocabulary))

    def _check_guide(self, guide: GuidedDecodingParams | None) -> None:
        if guide is None or self._guides == "xgrammar" or (self._guides and guide.structural_tag is None):
            return
        name, backend = ("", "NAME") if guide.structural_tag is None else (".structural_tag", "xgrammar")
        raise InvalidRequestError(
            f"guided_decoding{name} is not supported by this engine without --guided-decoding-backend {backend}"
        )

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request's cache salt, priority, and session or rank as arguments of ``LLM.generate_async``."""
        priority, rank = request_metadata.priority(request) or 0, request_metadata.dp_rank(request)
        session = request_metadata.session_id(request)
        # From any integer to 0…1; Dynamo's 0 is TensorRT-LLM's default, 0.5.
        options: dict[str, Any] = {"priority": (1 + priority / (1 + abs(priority))) / 2}
        options["cache_salt"] = request_metadata.cache_salt(request)
        if self._sessions and session is not None:
            options["conversation_params"] = ConversationParams(conversation_id=session)
        if self._ranks and not self._sessions and rank is not None:
            options["scheduling_params"] = SchedulingParams(attention_dp_rank=rank, attention_dp_relax=False)
        return options
