"""From Dynamo's requests to an engine's parameters: every field is passed on, left to the frontend, or refused by name.

An engine writes its tables down (which field becomes which parameter, read how); reading them is the same for all. A
field that no table knows is refused: it must never be dropped in silence. What a request can make long has a limit
(``request_limits.py``): everything here runs on the event loop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.json_schema import check_regex, check_schema, check_size, check_structural_tag

if TYPE_CHECKING:
    from dynamo_worker.requests import Request

#: Reads one value of a request and returns it for the engine. Gets the field's full name for its error message.
Reader = Callable[[str, Any], Any]
#: A field that concerns text, stop strings or routing: the frontend has dealt with it.
FRONTEND: Final = None
#: One section of a request: for every field the engine's name and the reader, or :data:`FRONTEND`. Fields with the same
#: engine's name add up (lists); an empty name checks the value only.
Fields = Mapping[str, "tuple[str, Reader] | None"]

#: A request for the log-probabilities of the whole vocabulary: -1, which the frontend sends as an unsigned number.
_WHOLE_VOCABULARY: Final = 2**32 - 1
#: Marks a cache salt of ours in KV events, where it stands untyped among other strings (Dynamo's convention).
_SALT_PREFIX: Final = "dynamo-cache-salt:"

#: What else stands in a request, besides the four sections, and who takes care of it.
_HANDLED: Final = frozenset(
    {
        # read by every engine
        *("model", "token_ids", "sampling_options", "stop_conditions", "output_options", "routing", "extra_args"),
        *("prefill_result", "nvext", "agent_context"),
        # by the frontend, the router or the core
        *("annotations", "mdc_sum", "router_config_override", "migration_link", "migration_state", "jail_seed"),
        *("_HEALTH_CHECK", "request_id", "tracker", "mm_routing_info", "estimated_prefix_hit_num_blocks"),
        *("backend_instance_id", "bootstrap_info", "router", "request_timestamp_ms"),
        # engines know the model's own end-of-sequence tokens; the frontend stops at these as well
        "eos_token_ids",
    }
)

#: The keys of ``guided_decoding`` (Dynamo 1.6.1).
GUIDED: Final = ("json", "regex", "choice", "grammar", "whitespace_pattern", "structural_tag")
#: Those that are text in a language of their own.
_GUIDE_TEXTS: Final = {
    "grammar": limits.GRAMMAR_CHARACTERS,
    "whitespace_pattern": limits.WHITESPACE_CHARACTERS,
}
#: Least penalty of repetitions: logits are divided by it, and one of 1e-40 makes them infinite.
_LEAST_PENALTY: Final = 1e-3
#: Longest token id as text, longer than any of 64 bits.
_LONGEST_ID: Final = 20


def refusal(name: str, expected: str, value: object) -> InvalidRequestError:
    """Return the error for a value of the wrong kind."""
    return InvalidRequestError(f"{name}: {expected} is needed, not {shown(value)}")


def integer(name: str, value: Any) -> int:
    """Read a 64-bit integer; a float without a fraction is one too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise refusal(name, "a 64-bit integer", value)
    return value


def number(name: str, value: Any) -> float:
    """Read a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refusal(name, "a finite number", value)
    try:
        read = float(value)
    except OverflowError:
        read = math.inf
    if not math.isfinite(read):
        raise refusal(name, "a finite number", value)
    return read


def boolean(name: str, value: Any) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise refusal(name, "true or false", value)
    return value


def string(name: str, value: Any) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise refusal(name, "a string", value)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Read an object, which is passed on as it is."""
    if not isinstance(value, Mapping):
        raise refusal(name, "an object", value)
    check_size(name, value)
    return dict(value)


def tokens(name: str, value: Any) -> list[int]:
    """Read a list of token ids: some that mean something."""
    return _tokens(name, value, limits.STOP_TOKENS)


def allowed_tokens(name: str, value: Any) -> list[int]:
    """Read a list of token ids: a part of the vocabulary, however large."""
    return _tokens(name, value, limits.ALLOWED_TOKENS)


def _tokens(name: str, value: Any, limit: limits.Limit) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise refusal(name, "a list of tokens", value)
    limit.check(name, len(value))
    if set(map(type, value)) == {int} and min(value) >= -(2**63) and max(value) < 2**63:
        return list(value)  # a tenth of the time that the next line takes
    return [integer(name, token) for token in value]


def answers(name: str, value: Any) -> int:
    """Read the number of answers."""
    number_of = integer(name, value)
    if number_of < 1:
        raise refusal(name, "a positive number", value)
    limits.ANSWERS.check(name, number_of)
    return number_of


def rank(name: str, value: Any) -> int | None:
    """Read a data-parallel rank, which has 32 bits in Dynamo; None stays None."""
    if value is None:
        return None
    number_of = integer(name, value)
    if not 0 <= number_of < 2**32:
        raise refusal(name, "a rank", value)
    return number_of


def count(name: str, value: Any) -> int:
    """Read a number of log-probabilities; -1 is the whole vocabulary."""
    number_of = integer(name, value)
    if number_of == _WHOLE_VOCABULARY:
        return -1
    if number_of < -1:
        raise refusal(name, "a number of tokens", value)
    return number_of


def length(name: str, value: Any) -> int:
    """Read a number that counts tokens or the like: what engines have 32 bits for."""
    number_of = integer(name, value)
    if not 0 <= number_of < 2**31:
        raise refusal(name, "a number of tokens", value)
    return number_of


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """Read what is added to the logits of tokens, kept between -100 and 100 as in the OpenAI interface."""
    if not isinstance(value, Mapping):
        raise refusal(name, "an object of tokens and numbers", value)
    limits.BIASES.check(name, len(value))
    try:
        # What a number as text costs grows with the second power of its length.
        if any(isinstance(token, str) and len(token) > _LONGEST_ID for token in value):
            raise ValueError
        ids = [int(token) for token in value]
    except (TypeError, ValueError, OverflowError):
        raise refusal(name, "an object of tokens and numbers", value) from None
    if ids and not -(2**31) <= min(ids) <= max(ids) < 2**31:
        raise refusal(name, "an object of tokens and numbers", value)
    return {token: min(100.0, max(-100.0, number(name, bias))) for token, bias in zip(ids, value.values(), strict=True)}


def repetition_penalty(name: str, value: Any) -> float:
    """Read what the logits of tokens that were there already are divided by; engines refuse 0 and below themselves."""
    read = number(name, value)
    if 0 < read < _LEAST_PENALTY:
        raise refusal(name, f"a number from {_LEAST_PENALTY:g}", value)
    return read


def unsupported(*harmless: object) -> Reader:
    """Return the reader of a field that the engine has nothing for; the ``harmless`` values ask for nothing."""

    def read(name: str, value: Any) -> None:
        if value not in harmless:
            raise InvalidRequestError(f"{name} = {shown(value)} is not supported by this engine")

    return read


def guided_decoding(value: Any) -> dict[str, Any]:
    """Return the constraint on the output's text, checked: an object with one or more of :data:`GUIDED`, or empty.

    ``structural_tag`` is JSON text. The engine as a whole has one grammar backend, so ``backend`` can only be ``auto``.

    :raises InvalidRequestError: a key is unknown, wrong or too large, or a JSON schema refers to itself without ever
        getting on.
    """
    if not isinstance(value, Mapping):
        raise refusal("guided_decoding", "an object", value)
    given = {key: entry for key, entry in value.items() if entry is not None}
    backend = given.pop("backend", "auto")
    if backend != "auto":
        raise InvalidRequestError(
            f"guided_decoding.backend = {shown(backend)} is not supported: a flag of the engine chooses the backend"
        )
    for key in given:
        if key not in GUIDED:
            raise InvalidRequestError(f"guided_decoding.{key} is not supported by this engine")
    if "regex" in given:
        check_regex("guided_decoding.regex", string("guided_decoding.regex", given["regex"]))
    for key, limit in _GUIDE_TEXTS.items():
        if key in given:
            limit.check(f"guided_decoding.{key}", len(string(f"guided_decoding.{key}", given[key])))
    if "choice" in given:
        _check_choices(given["choice"])
    if "json" in given:
        schema = given["json"]
        if not isinstance(schema, (str, Mapping)):
            raise refusal("guided_decoding.json", "a JSON schema", schema)
        check_schema("guided_decoding.json", schema)
    if "structural_tag" in given:
        tag = given["structural_tag"]
        if not isinstance(tag, (str, Mapping)):
            raise refusal("guided_decoding.structural_tag", "an object", tag)
        check_structural_tag("guided_decoding.structural_tag", tag)
        given["structural_tag"] = tag if isinstance(tag, str) else json.dumps(tag)
    return given if given.keys() - {"whitespace_pattern"} else {}


def _check_choices(choices: Any) -> None:
    name = "guided_decoding.choice"
    if not isinstance(choices, (list, tuple)) or not choices:
        raise refusal(name, "a list of strings", choices)
    limits.CHOICES.check(name, len(choices))
    if not all(isinstance(choice, str) for choice in choices):
        raise refusal(name, "a list of strings", choices)
    limits.CHOICE_CHARACTERS.check(name, sum(map(len, choices)))


def section(request: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return one object of a request, however deep; empty when it is missing or null.

    :raises InvalidRequestError: it is no object.
    """
    current: Any = request
    for name in names:
        current = current.get(name)
        if current is None:
            return {}
        if not isinstance(current, Mapping):
            raise refusal(name, "an object", current)
    found: Mapping[str, Any] = current
    return found


#: What engines have under Dynamo's own names, or nobody has: they write down where theirs differ.
SAMPLING: Final[Fields] = {
    "n": ("n", answers),
    "presence_penalty": ("presence_penalty", number),
    "frequency_penalty": ("frequency_penalty", number),
    "repetition_penalty": ("repetition_penalty", repetition_penalty),
    "temperature": ("temperature", number),
    "top_p": ("top_p", number),
    "top_k": ("top_k", integer),
    "min_p": ("min_p", number),
    "seed": ("seed", integer),
    "best_of": ("", integer),  # only the same as n
    "use_beam_search": ("", unsupported(False)),
    "length_penalty": ("", unsupported(1)),  # of beam search
    "include_stop_str_in_output": FRONTEND,
}
#: Engines stop at tokens, the frontend at strings.
STOP: Final[Fields] = {
    "max_tokens": ("max_tokens", integer),
    "min_tokens": ("min_tokens", integer),
    "stop": FRONTEND,
    "stop_token_ids": ("stop_token_ids", tokens),
    "stop_token_ids_visible": ("stop_token_ids", tokens),
    "stop_token_ids_hidden": ("stop_token_ids", tokens),  # the frontend hides them
    "ignore_eos": ("ignore_eos", boolean),
    "max_thinking_tokens": ("max_thinking_tokens", length),
}
OUTPUT: Final[Fields] = {
    "logprobs": ("logprobs", count),
    "prompt_logprobs": ("prompt_logprobs", count),
    "skip_special_tokens": FRONTEND,
    "formatted_prompt": FRONTEND,
    "return_tokens_as_token_ids": FRONTEND,
    "no_stop_trim": FRONTEND,
}


@dataclass(frozen=True)
class RequestTable:
    """What an engine makes of each field of a request.

    :param sampling: ``sampling_options``.
    :param stop: ``stop_conditions``.
    :param output: ``output_options``.
    :param extra: ``extra_args.sampling_options``, options that Dynamo has no field for.
    :param handled: further parts of a request that the engine, or nobody, needs to take care of.
    """

    sampling: Fields
    stop: Fields
    output: Fields
    extra: Fields = field(default_factory=dict)
    handled: frozenset[str] = frozenset()

    def read(self, request: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the engine's parameters: the defaults, and what the request says.

        :raises InvalidRequestError: a field is unknown, not supported or wrong; the message names it.
        """
        for key in request:
            if key not in _HANDLED and key not in self.handled and request[key]:
                raise InvalidRequestError(f"{key} is not supported by this engine")
        values = dict(defaults)
        _read("sampling_options", self.sampling, section(request, "sampling_options"), values)
        extra = section(request, "extra_args", "sampling_options")
        _read("extra_args.sampling_options", self.extra, extra, values)
        _read("stop_conditions", self.stop, section(request, "stop_conditions"), values)
        _read("output_options", self.output, section(request, "output_options"), values)
        best_of = section(request, "sampling_options").get("best_of")
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


class ModelTable:
    """Reads requests for one model."""

    def __init__(self, table: RequestTable, defaults: Mapping[str, Any], context_length: int) -> None:
        """Remember the model.

        :param defaults: what its own generation configuration says, by the engine's names.
        :param context_length: longest sequence in tokens.
        """
        self._table = table
        self._defaults = dict(defaults)
        self._context_length = context_length
        limit = table.stop["max_tokens"]
        assert limit is not None, "an engine has a limit of tokens"
        self._limit = limit[0]
        prompt_logprobs = table.output.get("prompt_logprobs")
        self._prompt_logprobs = None if prompt_logprobs is None else prompt_logprobs[0]

    def read(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the engine's parameters, with a limit that fits into the context; None if no token is asked for.

        :raises InvalidRequestError: the prompt leaves no room for a token; a field is unknown, not supported or wrong,
            and the message names it.
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
        # Engines differ in what they do without a limit, or with one that does not fit: one of them refuses.
        values[self._limit] = room if limit is None else min(limit, room)
        return values


def _check_prompt_logprobs(prompt: int, alternatives: int) -> None:
    name = "output_options.prompt_logprobs"
    if alternatives < 0:
        raise InvalidRequestError(f"{name}: the whole vocabulary is not supported for the tokens of the prompt")
    limits.PROMPT_LOGPROBS.check(name, prompt * (alternatives + 1))


def cache_salt(request: Mapping[str, Any]) -> str | None:
    """Return what keeps this request's share of the prefix cache apart from that of others."""
    for source in (section(request, "routing"), section(request, "nvext"), section(request, "extra_args", "nvext")):
        salt = source.get("cache_salt")
        if salt:
            limits.ID_CHARACTERS.check("cache_salt", len(string("cache_salt", salt)))
            return f"{_SALT_PREFIX}{salt}"
    return None


def priority(request: Mapping[str, Any]) -> int:
    """Return the priority; the highest number goes first."""
    value = section(request, "routing").get("priority")
    return 0 if value is None else integer("routing.priority", value)


def session_id(request: Mapping[str, Any]) -> str | None:
    """Return the id of the agent's session that the request belongs to."""
    value = section(request, "agent_context").get("session_id")
    if not isinstance(value, str):
        return None
    limits.ID_CHARACTERS.check("agent_context.session_id", len(value))
    return value.strip() or None


def adapter_name(request: Mapping[str, Any]) -> str | None:
    """Return the name that decides about the LoRA adapter: the router's choice, or the model asked for."""
    name = section(request, "routing").get("lora_name") or request.get("model")
    return name if isinstance(name, str) else None


def canary(tokenizer: object, text_config: object, *, prompt_tokens: int = 1) -> Request:
    """Return a request for one token, made of the token with which the model's prompts begin.

    :param tokenizer: of the Hugging Face kind; None where there is none.
    :param text_config: the model's Hugging Face configuration.
    :param prompt_tokens: how often the prompt has that token.
    """
    candidates = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(text_config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    first = next((token for token in candidates if isinstance(token, int)), 0)
    return {
        "token_ids": [first] * prompt_tokens,
        "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
    }
