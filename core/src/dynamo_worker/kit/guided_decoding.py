"""Guided decoding: the constraint that a request puts on the text of its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.fields import refusal, string
from dynamo_worker.kit.json_schema import check_regex, check_schema, check_structural_tag

#: The keys of ``guided_decoding`` (Dynamo 1.6.1).
KEYS: Final = ("json", "regex", "choice", "grammar", "whitespace_pattern", "structural_tag")
#: The limits of those keys that hold text which is only checked for its length.
_TEXTS: Final = {
    "grammar": limits.GRAMMAR_CHARACTERS,
    "whitespace_pattern": limits.WHITESPACE_CHARACTERS,
}


def read(value: Any) -> dict[str, Any]:
    """Return the checked constraint: an object with one or more of :data:`KEYS`, or an empty one.

    ``structural_tag`` is returned as JSON text. An engine has one grammar backend for all requests, so ``backend`` can
    only be ``auto``.

    :raises InvalidRequestError: a key is unknown, wrong or too large, or a JSON schema refers to itself without
        consuming any text.
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
        if key not in KEYS:
            raise InvalidRequestError(f"guided_decoding.{key} is not supported by this engine")
    if "regex" in given:
        check_regex("guided_decoding.regex", string("guided_decoding.regex", given["regex"]))
    for key, limit in _TEXTS.items():
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


def read_one(value: Any, *, whitespace: str = "") -> dict[str, str]:
    """Return the constraint for an engine that takes one, as text.

    It is ``json``, ``regex``, ``grammar`` or ``structural_tag``; ``choice`` becomes a regular expression. The result is
    empty without a constraint.

    :param whitespace: what to use instead of ``whitespace_pattern``, for the message.
    :raises InvalidRequestError: as :func:`read` does, or there are several constraints or a ``whitespace_pattern``.
    """
    given = read(value)
    if given.pop("whitespace_pattern", None) is not None:
        instead = f"; {whitespace}" if whitespace else ""
        raise InvalidRequestError(f"guided_decoding.whitespace_pattern is not supported by this engine{instead}")
    if len(given) > 1:
        raise InvalidRequestError(f"guided_decoding: only one of {', '.join(sorted(given))} can be given")
    if "choice" in given:
        return {"regex": "(" + "|".join(map(re.escape, given["choice"])) + ")"}
    return {kind: entry if isinstance(entry, str) else json.dumps(entry) for kind, entry in given.items()}


def _check_choices(choices: Any) -> None:
    name = "guided_decoding.choice"
    if not isinstance(choices, (list, tuple)) or not choices:
        raise refusal(name, "a list of strings", choices)
    limits.CHOICES.check(name, len(choices))
    if not all(isinstance(choice, str) for choice in choices):
        raise refusal(name, "a list of strings", choices)
    limits.CHOICE_CHARACTERS.check(name, sum(map(len, choices)))
