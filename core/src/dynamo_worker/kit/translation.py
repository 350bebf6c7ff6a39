"""From Dynamo's requests to an engine's parameters: every field is passed on, left to the frontend, or refused by name.

An engine states in a :class:`RequestTable` which field becomes which parameter, and how it is read. A field that is in
no table is refused, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.kit import fields
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.canary import MARK

#: A field about text, stop strings or routing, which the frontend has dealt with.
FRONTEND: Final = None
#: One section of a request: for every field the engine's name and the reader, or :data:`FRONTEND`. Lists with the same
#: engine's name are joined; an empty name only checks the value.
Fields = Mapping[str, "tuple[str, fields.Reader] | None"]

_T = TypeVar("_T")

#: The other keys of a request, and who takes care of them.
_HANDLED: Final = frozenset(
    {
        # every engine
        *("model", "token_ids", "sampling_options", "stop_conditions", "output_options", "routing", "extra_args"),
        *("prefill_result", "nvext", "agent_context"),
        # the frontend, the router or the core
        *("annotations", "mdc_sum", "router_config_override", "migration_link", "migration_state", "jail_seed"),
        *(MARK, "request_id", "tracker", "mm_routing_info", "estimated_prefix_hit_num_blocks"),
        *("backend_instance_id", "bootstrap_info", "router", "request_timestamp_ms"),
        # engines know the model's own end-of-sequence tokens, and the frontend stops at these as well
        "eos_token_ids",
    }
)

#: The fields that engines have under Dynamo's own names, or that none has.
SAMPLING: Final[Fields] = {
    "n": ("n", fields.answer_count),
    "presence_penalty": ("presence_penalty", fields.number),
    "frequency_penalty": ("frequency_penalty", fields.number),
    "repetition_penalty": ("repetition_penalty", fields.repetition_penalty),
    "temperature": ("temperature", fields.number),
    "top_p": ("top_p", fields.number),
    "top_k": ("top_k", fields.integer),
    "min_p": ("min_p", fields.number),
    "seed": ("seed", fields.integer),
    "best_of": ("", fields.integer),  # only the same as n
    "use_beam_search": ("", fields.unsupported(False)),
    "length_penalty": ("", fields.unsupported(1)),  # of beam search
    "include_stop_str_in_output": FRONTEND,
}
#: Engines stop at tokens, the frontend at strings.
STOP: Final[Fields] = {
    "max_tokens": ("max_tokens", fields.integer),
    "min_tokens": ("min_tokens", fields.integer),
    "stop": FRONTEND,
    "stop_token_ids": ("stop_token_ids", fields.token_ids),
    "stop_token_ids_visible": ("stop_token_ids", fields.token_ids),
    "stop_token_ids_hidden": ("stop_token_ids", fields.token_ids),  # the frontend hides them
    "ignore_eos": ("ignore_eos", fields.boolean),
    "max_thinking_tokens": ("max_thinking_tokens", fields.token_count),
}
OUTPUT: Final[Fields] = {
    "logprobs": ("logprobs", fields.logprob_count),
    "prompt_logprobs": ("prompt_logprobs", fields.logprob_count),
    "skip_special_tokens": FRONTEND,
    "formatted_prompt": FRONTEND,
    "return_tokens_as_token_ids": FRONTEND,
    "no_stop_trim": FRONTEND,
}


@dataclass
class Translated:
    """A request in an engine's terms; each engine adds its own sampling parameters.

    :param n: number of answers.
    :param options: further arguments of the engine's method that takes requests.
    :param top: number of likeliest tokens reported with each token; None for no log-probabilities.
    :param prompt_top: the same for the tokens of the prompt.
    """

    n: int
    options: dict[str, Any]
    top: int | None
    prompt_top: int | None


@dataclass(frozen=True)
class RequestTable:
    """The parameter of the engine that each field of a request becomes.

    :param sampling: ``sampling_options``.
    :param stop: ``stop_conditions``.
    :param output: ``output_options``.
    :param extra: ``extra_args.sampling_options``, options that Dynamo has no field for.
    :param handled: further keys of a request that the engine takes care of, or may ignore.
    """

    sampling: Fields
    stop: Fields
    output: Fields
    extra: Fields = field(default_factory=dict)
    handled: frozenset[str] = frozenset()

    @classmethod
    def of_engine(
        cls,
        *,
        sampling: Fields = MappingProxyType({}),
        stop: Fields = MappingProxyType({}),
        output: Fields = MappingProxyType({}),
        extra: Fields = MappingProxyType({}),
        handled: Iterable[str] = (),
    ) -> RequestTable:
        """Return the table of an engine, which states only where it differs from Dynamo's own names.

        ``extra`` is what ``extra_args.sampling_options`` may contain beside the fields of ``sampling``.
        """
        sampling = {**SAMPLING, **sampling}
        return cls(sampling, {**STOP, **stop}, {**OUTPUT, **output}, {**sampling, **extra}, frozenset(handled))

    def read(self, request: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the engine's parameters: the defaults, overridden by the request.

        :raises InvalidRequestError: a field is unknown, unsupported or wrong; the message names it.
        """
        for key in request:
            if key not in _HANDLED and key not in self.handled and request[key]:
                raise InvalidRequestError(f"{key} is not supported by this engine")
        values = dict(defaults)
        _read("sampling_options", self.sampling, fields.section(request, "sampling_options"), values)
        extra = fields.section(request, "extra_args", "sampling_options")
        _read("extra_args.sampling_options", self.extra, extra, values)
        _read("stop_conditions", self.stop, fields.section(request, "stop_conditions"), values)
        _read("output_options", self.output, fields.section(request, "output_options"), values)
        best_of = fields.section(request, "sampling_options").get("best_of")
        if best_of is not None and best_of not in (1, values.get("n", 1)):
            raise InvalidRequestError(f"sampling_options.best_of = {shown(best_of)} is not supported by this engine")
        return values


def _read(where: str, table: Fields, options: Mapping[str, Any], values: dict[str, Any]) -> None:
    for key, value in options.items():
        if value is None:
            continue
        try:
            entry = table[key]
        except KeyError:
            raise InvalidRequestError(f"{where}.{key} is not supported by this engine") from None
        if entry is FRONTEND:
            continue
        target, read = entry
        result = read(f"{where}.{key}", value)
        if not target:
            continue
        if isinstance(result, list) and target in values:
            result = [*values[target], *result]
        values[target] = result


class ModelTable(Generic[_T]):
    """Translates requests for one model into the engine's own terms."""

    def __init__(self, table: RequestTable, defaults: Mapping[str, Any], context_length: int) -> None:
        """Take the model's properties.

        :param defaults: the model's generation configuration, by the engine's names.
        :param context_length: longest sequence in tokens.
        """
        self._table = table
        self._defaults = dict(defaults)
        self._context_length = context_length
        limit = table.stop["max_tokens"]
        assert limit is not None, "every engine limits the number of tokens"
        self._limit = limit[0]
        prompt_logprobs = table.output.get("prompt_logprobs")
        self._prompt_logprobs = None if prompt_logprobs is None else prompt_logprobs[0]

    def translate(self, request: Mapping[str, Any]) -> _T | None:
        """Return a request in the engine's terms, or None if it asks for no tokens.

        :raises InvalidRequestError: as :meth:`read` and :meth:`convert` do.
        """
        values = self.read(request)
        return None if values is None else self.convert(values, request)

    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> _T:
        """Turn the engine's parameters into what the engine takes; every engine's table has its own.

        :param values: the parameters, by the engine's names; may be changed.
        :raises InvalidRequestError: the engine refuses them.
        """
        raise NotImplementedError

    def read(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the engine's parameters, with a token limit that fits the context; None if no tokens are asked for.

        :raises InvalidRequestError: the prompt leaves no room for a token, or a field is unknown, unsupported or wrong;
            the message names it.
        """
        prompt = len(request["token_ids"])
        room = self._context_length - prompt
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {prompt} tokens; the model's context length is {self._context_length}, and at least "
                "one token must be left for the answer"
            )
        values = self._table.read(request, self._defaults)
        limit = values.get(self._limit)
        if limit == 0:
            return None
        alternatives = values.get(self._prompt_logprobs) if self._prompt_logprobs is not None else None
        if alternatives is not None:
            _check_prompt_logprobs(prompt, alternatives)
        # Engines disagree on a missing limit, and some refuse one that does not fit.
        values[self._limit] = room if limit is None else min(limit, room)
        return values


def _check_prompt_logprobs(prompt: int, alternatives: int) -> None:
    name = "output_options.prompt_logprobs"
    if alternatives < 0:
        raise InvalidRequestError(f"{name}: the whole vocabulary is not supported for the tokens of the prompt")
    limits.PROMPT_LOGPROBS.check(name, prompt * (alternatives + 1))
