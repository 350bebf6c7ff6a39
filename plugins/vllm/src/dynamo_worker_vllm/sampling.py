"""The translation table: every field of a Dynamo request, and what becomes of it in vLLM.

A field is passed on, left to the frontend (which makes the text and therefore owns everything that concerns text), or
refused by its name. A field that this table does not know is refused as well: it must never be dropped in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from dynamo_worker import InvalidRequestError

#: A request for the log-probabilities of the whole vocabulary: -1, which the frontend sends as an unsigned number.
_WHOLE_VOCABULARY: Final = 2**32 - 1
#: Marks a cache salt of ours in vLLM's KV events, where it stands untyped among other strings (Dynamo's convention).
_SALT_PREFIX: Final = "dynamo-cache-salt:"

#: Reads one value of a request and returns it for vLLM.
Reader = Callable[[str, Any], Any]


def _refuse(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {expected} is needed, not {value!r:.80}")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise _refuse(name, "a 64-bit integer", value)
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refuse(name, "a finite number", value)
    return float(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "true or false", value)
    return value


def _tokens(name: str, value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise _refuse(name, "a list of tokens", value)
    return [_integer(name, token) for token in value]


def _count(name: str, value: Any) -> int:
    """Read a number of log-probabilities."""
    count = _integer(name, value)
    if count == _WHOLE_VOCABULARY:
        return -1
    if count < -1:
        raise _refuse(name, "a number of tokens", value)
    return count


def _thinking(name: str, value: Any) -> int:
    budget = _integer(name, value)
    if budget < 0:
        raise _refuse(name, "a number of tokens", value)
    return budget


def _unsupported(*harmless: object) -> Reader:
    """Return the reader of a field that vLLM has nothing for; the ``harmless`` values ask for nothing."""

    def read(name: str, value: Any) -> None:
        if value not in harmless:
            raise InvalidRequestError(f"{name} = {value!r:.80} is not supported by the vLLM engine")

    return read


#: A field that concerns text, stop strings or routing: the frontend has dealt with it.
FRONTEND: Final = None

#: ``sampling_options``: the name in :class:`SamplingParams` and the reader; :data:`FRONTEND` for the frontend's own.
SAMPLING: Final[Mapping[str, tuple[str, Reader] | None]] = {
    "n": ("n", _integer),
    "presence_penalty": ("presence_penalty", _number),
    "frequency_penalty": ("frequency_penalty", _number),
    "repetition_penalty": ("repetition_penalty", _number),
    "temperature": ("temperature", _number),
    "top_p": ("top_p", _number),
    "top_k": ("top_k", _integer),
    "min_p": ("min_p", _number),
    "seed": ("seed", _integer),
    "best_of": ("", _integer),  # only the same as n, see `translate`
    "use_beam_search": ("", _unsupported(False)),
    "length_penalty": ("", _unsupported(1)),  # of beam search
    "include_stop_str_in_output": FRONTEND,
    "guided_decoding": ("structured_outputs", lambda _, value: guided_decoding(value)),
}

#: ``stop_conditions``. vLLM stops at tokens, the frontend at strings.
STOP: Final[Mapping[str, tuple[str, Reader] | None]] = {
    "max_tokens": ("max_tokens", _integer),
    "min_tokens": ("min_tokens", _integer),
    "stop": FRONTEND,
    "stop_token_ids": ("stop_token_ids", _tokens),
    "stop_token_ids_visible": ("stop_token_ids", _tokens),
    "stop_token_ids_hidden": ("stop_token_ids", _tokens),  # the frontend hides them
    "ignore_eos": ("ignore_eos", _boolean),
    "max_thinking_tokens": ("thinking_token_budget", _thinking),
}

#: ``output_options``.
OUTPUT: Final[Mapping[str, tuple[str, Reader] | None]] = {
    "logprobs": ("logprobs", _count),
    "prompt_logprobs": ("prompt_logprobs", _count),
    "skip_special_tokens": FRONTEND,
    "formatted_prompt": FRONTEND,
    "return_tokens_as_token_ids": FRONTEND,
    "no_stop_trim": FRONTEND,
}

#: ``extra_args.sampling_options``: options of vLLM that Dynamo has no field for.
EXTRA: Final[Mapping[str, tuple[str, Reader] | None]] = {
    **SAMPLING,
    "allowed_token_ids": ("allowed_token_ids", _tokens),
    "logprob_token_ids": ("logprob_token_ids", _tokens),
    "logit_bias": ("logit_bias", lambda name, value: _logit_bias(name, value)),
    "skip_reading_prefix_cache": ("skip_reading_prefix_cache", _boolean),
    "stream_interval": ("stream_interval", _integer),
}

#: The keys of ``guided_decoding``.
GUIDED: Final = ("json", "regex", "choice", "grammar", "whitespace_pattern", "structural_tag")

#: What else stands in a request, and who takes care of it; everything that is not named here is refused.
HANDLED: Final = frozenset(
    {
        # here and in engine.py
        *("model", "token_ids", "sampling_options", "stop_conditions", "output_options", "routing", "extra_args"),
        *("prefill_result", "nvext", "agent_context"),
        # by the frontend, the router or the core
        *("annotations", "mdc_sum", "router_config_override", "migration_link", "migration_state", "jail_seed"),
        *("_HEALTH_CHECK", "request_id", "tracker", "mm_routing_info", "estimated_prefix_hit_num_blocks"),
        *("backend_instance_id", "bootstrap_info"),
        # vLLM knows the model's own end-of-sequence tokens; the frontend stops at these as well
        "eos_token_ids",
        # of SGLang's grammar backend; vLLM goes by its --reasoning-parser
        "require_reasoning",
    }
)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _refuse(name, "an object of tokens and numbers", value)
    try:
        tokens = [int(token) for token in value]
    except (TypeError, ValueError):
        raise _refuse(name, "an object of tokens and numbers", value) from None
    return {
        token: min(100.0, max(-100.0, _number(name, bias))) for token, bias in zip(tokens, value.values(), strict=True)
    }


def guided_decoding(value: Any) -> StructuredOutputsParams | None:
    """Return what the output must look like, or None if it may look like anything.

    :raises InvalidRequestError: a key is unknown or wrong, several constraints contradict each other, or a JSON schema
        refers to itself without ever getting on.
    """
    if not isinstance(value, Mapping):
        raise _refuse("guided_decoding", "an object", value)
    given = {key: entry for key, entry in value.items() if entry is not None}
    # vLLM chooses the backend for the whole engine, "auto" is what it does anyway.
    backend = given.pop("backend", "auto")
    if backend != "auto":
        raise InvalidRequestError(
            f"guided_decoding.backend = {backend!r:.80} is not supported: the engine's --structured-outputs-config "
            "chooses the backend"
        )
    for key in given:
        if key not in GUIDED:
            raise InvalidRequestError(f"guided_decoding.{key} is not supported by the vLLM engine")
    for key in ("regex", "grammar", "whitespace_pattern"):
        if key in given and not isinstance(given[key], str):
            raise _refuse(f"guided_decoding.{key}", "a string", given[key])
    choice = given.get("choice")
    if choice is not None and not (
        isinstance(choice, (list, tuple)) and choice and all(isinstance(entry, str) for entry in choice)
    ):
        raise _refuse("guided_decoding.choice", "a list of strings", choice)
    if "json" in given:
        schema = given["json"]
        if not isinstance(schema, (str, Mapping)):
            raise _refuse("guided_decoding.json", "a JSON schema", schema)
        check_references(schema)
    if "structural_tag" in given and not isinstance(given["structural_tag"], str):
        given["structural_tag"] = json.dumps(given["structural_tag"])
    if not given.keys() - {"whitespace_pattern"}:
        return None
    try:
        return StructuredOutputsParams(**given)
    except Exception as error:
        raise InvalidRequestError(f"guided_decoding: {error}") from error


def check_references(schema: str | Mapping[str, Any]) -> None:
    """Refuse a JSON schema in which a reference leads back to itself through nothing but references.

    No text satisfies it, and grammar compilers run in circles.

    :raises InvalidRequestError: there is such a reference, or the schema is no JSON object.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise InvalidRequestError(f"guided_decoding.json is not JSON: {error}") from error
        if not isinstance(schema, Mapping):
            raise _refuse("guided_decoding.json", "an object", schema)
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            waiting += node.values()
            _follow(schema, node)
        elif isinstance(node, (list, tuple)):
            waiting += node


def _follow(schema: Mapping[str, Any], node: Mapping[str, Any]) -> None:
    """Follow a chain of references to something that is none."""
    seen: list[str] = []
    current: Any = node
    while isinstance(current, Mapping) and isinstance(current.get("$ref"), str):
        reference = current["$ref"]
        if reference in seen:
            raise InvalidRequestError(f"guided_decoding.json: the reference {reference!r:.80} leads back to itself")
        seen.append(reference)
        if not reference.startswith("#"):
            return
        current = schema
        for part in reference[1:].strip("/").split("/") if reference[1:].strip("/") else ():
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(current, Mapping) or key not in current:
                return  # vLLM says what is wrong with it
            current = current[key]


def section(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one object of a request; empty when it is missing or null.

    :raises InvalidRequestError: it is no object.
    """
    value = request.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _refuse(name, "an object", value)
    return value


class SamplingTable:
    """Translates requests for one model."""

    def __init__(self, defaults: Mapping[str, Any], context_length: int) -> None:
        """Remember the model.

        :param defaults: what the model's generation configuration says, by the names of ``SamplingParams``.
        :param context_length: longest sequence in tokens.
        """
        self._defaults = dict(defaults)
        self._context_length = context_length

    def translate(self, request: Mapping[str, Any]) -> SamplingParams | None:
        """Return the sampling parameters of a request, or None if it asks for no token at all.

        :raises InvalidRequestError: a field is unknown, not supported or wrong; the message names it.
        """
        for key in request:
            if key not in HANDLED and request[key]:
                raise InvalidRequestError(f"{key} is not supported by the vLLM engine")
        tokens = len(request["token_ids"])
        room = self._context_length - tokens
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {tokens} tokens; the model's context length is {self._context_length}, and at least "
                "one token must be left for the answer"
            )
        values = dict(self._defaults)
        extra = section(section(request, "extra_args"), "sampling_options")
        options = section(request, "sampling_options")
        self._read("sampling_options", SAMPLING, options, values)
        if extra:
            self._read("extra_args.sampling_options", EXTRA, extra, values)
        self._read("stop_conditions", STOP, section(request, "stop_conditions"), values)
        self._read("output_options", OUTPUT, section(request, "output_options"), values)
        best_of = options.get("best_of")
        if best_of is not None and best_of not in (1, values.get("n", 1)):
            raise InvalidRequestError(f"sampling_options.best_of = {best_of!r:.80} is not supported by the vLLM engine")
        limit = values.get("max_tokens")
        if limit == 0:
            return None
        values["max_tokens"] = room if limit is None else limit
        if values.get("logprob_token_ids"):
            values.pop("logprobs", None)  # vLLM derives the number from the list
        try:
            return SamplingParams(**values, detokenize=False, output_kind=RequestOutputKind.DELTA, skip_clone=True)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise InvalidRequestError(str(error)) from error

    @staticmethod
    def _read(
        where: str,
        table: Mapping[str, tuple[str, Reader] | None],
        given: Mapping[str, Any],
        values: dict[str, Any],
    ) -> None:
        for key, value in given.items():
            if value is None:
                continue
            try:
                entry = table[key]
            except KeyError:
                raise InvalidRequestError(f"{where}.{key} is not supported by the vLLM engine") from None
            if entry is FRONTEND:
                continue
            target, read = entry
            result = read(f"{where}.{key}", value)
            if not target:
                continue
            if target == "stop_token_ids" and target in values:
                result = [*values[target], *result]
            values[target] = result


def cache_salt(request: Mapping[str, Any]) -> str | None:
    """Return what keeps this request's share of the prefix cache apart from that of others."""
    for source in (section(request, "routing"), section(request, "nvext"), _nested(request, "extra_args", "nvext")):
        salt = source.get("cache_salt")
        if salt:
            if not isinstance(salt, str):
                raise _refuse("cache_salt", "a string", salt)
            return _SALT_PREFIX + salt
    return None


def priority(request: Mapping[str, Any]) -> int:
    """Return vLLM's priority: the lowest number goes first, Dynamo's is the other way round."""
    value = section(request, "routing").get("priority")
    return 0 if value is None else -_integer("routing.priority", value)


def session_id(request: Mapping[str, Any]) -> str | None:
    """Return the id of the agent's session that the request belongs to."""
    value = section(request, "agent_context").get("session_id")
    return (value.strip() or None) if isinstance(value, str) else None


def _nested(request: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    current: Mapping[str, Any] = request
    for name in names:
        current = section(current, name)
    return current
