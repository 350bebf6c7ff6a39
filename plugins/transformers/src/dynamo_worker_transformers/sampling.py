"""The translation table: what the engine's process gets for each field of a Dynamo request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields, guided_decoding, request_metadata, translation
from dynamo_worker.kit.translation import ModelTable, RequestTable

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Below this, logits divided by the temperature overflow; 0 takes the likeliest token.
_LEAST_TEMPERATURE: Final = 0.01
#: Largest 32-bit float, nearly.
_MOST: Final = 3e38


def _temperature(name: str, value: Any) -> float:
    temperature: float = fields.number_within(0, _MOST)(name, value)
    return temperature if temperature == 0.0 else max(temperature, _LEAST_TEMPERATURE)


def _top_k(name: str, value: Any) -> int:
    """Read ``top_k``, where -1 means all tokens as 0 does."""
    return 0 if value == -1 else fields.token_count(name, value)


def _no_guide(_: str, value: Any) -> None:
    if constraint := guided_decoding.read(value):
        raise InvalidRequestError(f"guided_decoding.{next(iter(constraint))} is not supported by this engine")


TABLE: Final = RequestTable.of_engine(
    sampling={
        "temperature": ("temperature", _temperature),
        "top_p": ("top_p", fields.number_within(0, 1)),
        "top_k": ("top_k", _top_k),
        "min_p": ("min_p", fields.number_within(0, 1)),
        "presence_penalty": ("presence_penalty", fields.number_within(-2, 2)),
        "frequency_penalty": ("frequency_penalty", fields.number_within(-2, 2)),
        "repetition_penalty": ("repetition_penalty", fields.number_within(1e-3, 1e3)),
        "guided_decoding": ("", _no_guide),
    },
    stop={
        "max_tokens": ("max_tokens", fields.token_count),
        "min_tokens": ("min_tokens", fields.token_count),
        "max_thinking_tokens": ("", fields.unsupported()),
    },
    # The batching loop computes the logits of the last position only.
    output={"prompt_logprobs": ("", fields.unsupported())},
    extra={"logit_bias": ("logit_bias", fields.logit_bias)},
    handled=("require_reasoning",),  # for engines with a grammar backend
)


@dataclass
class Translated(translation.Translated):
    """A request in the engine's terms.

    :param max_tokens: longest answer.
    :param ends: tokens that end an answer: the model's own and the request's.
    :param stop_token_ids: the request's.
    :param sampling: the sampler's parameters, by the names that ``sampler.py`` gives them.
    """

    max_tokens: int
    ends: list[int]
    stop_token_ids: list[int]
    sampling: dict[str, Any]


class SamplingTable(ModelTable[Translated]):
    """Translates requests for one model."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Take what the engine's process has told about the model (``core.py``)."""
        super().__init__(TABLE, model["sampling"], model["context_length"])
        self._vocabulary: int = model["vocab_size"]
        self._end_ids: list[int] = list(model["end_ids"])
        self._shares_prefixes: bool = model["prefix_sharing"]

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> Translated:
        """Return the request in the engine's terms.

        :raises InvalidRequestError: it asks for tokens that the model does not have, or for a cache of its own.
        """
        if self._shares_prefixes and request_metadata.cache_salt(request) is not None:
            raise InvalidRequestError(
                "cache_salt is not supported by this engine while requests share prefixes: start it with "
                "--no-prefix-sharing"
            )
        n, top = values.pop("n", 1), values.pop("logprobs", None)
        if top is not None:
            values["logprobs"] = top = fields.logprobs_per_token("output_options.logprobs", top, self._vocabulary)
        for token in values.get("logit_bias") or ():
            if not 0 <= token < self._vocabulary:
                raise InvalidRequestError(f"logit_bias: the model has no token {token}")
        # No token beyond the vocabulary is ever chosen.
        stop = [token for token in values.pop("stop_token_ids", ()) if 0 <= token < self._vocabulary]
        ends = [] if values.pop("ignore_eos", False) else self._end_ids
        limit = values.pop("max_tokens")
        return Translated(n, {}, top, None, limit, sorted({*ends, *stop}), stop, values)
