"""Checks of JSON that engines and their grammar compilers lack: its size, and references that lead nowhere.

Everything here runs on the event loop and takes time in proportion to what it looks at, which is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dynamo_worker import request_limits as limits
from dynamo_worker.errors import InvalidRequestError

#: Under these keys a structural tag has schemas.
_SCHEMA_KEYS: Final = frozenset({"schema", "json_schema"})


def check_schema(name: str, schema: str | Mapping[str, Any]) -> None:
    """Refuse a JSON schema that is too large, or in which a reference leads to itself through nothing but references.

    No text satisfies one that does, and grammar compilers run in circles.

    :param name: of the field, for the message.
    :raises InvalidRequestError: it is, there is such a reference, or the schema is no JSON object.
    """
    parsed = _parsed(name, schema)
    _check_references(name, _walk(name, parsed, parsed))


def check_structural_tag(name: str, tag: str | Mapping[str, Any]) -> None:
    """Do the same for a structural tag and the schemas in it."""
    _check_references(name, _walk(name, _parsed(name, tag)))


def check_size(name: str, value: object) -> None:
    """Refuse JSON that is too large, has too many parts or too many levels.

    :raises InvalidRequestError: it is, or does.
    """
    _walk(name, value)


def _parsed(name: str, given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(given, str):
        return given
    limits.JSON_CHARACTERS.check(name, len(given))
    try:
        parsed = json.loads(given)
    except RecursionError:
        raise InvalidRequestError(f"{name}: too many levels, at most {limits.JSON_LEVELS.most} are accepted") from None
    except ValueError as error:
        raise InvalidRequestError(f"{name} is not JSON: {error}") from error
    if not isinstance(parsed, Mapping):
        raise InvalidRequestError(f"{name}: an object is needed")
    return parsed


def _walk(
    name: str, value: object, schema: Mapping[str, Any] | None = None
) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Return every object in a value, level by level, with the schema that it is a part of.

    The limits are checked on the way: no more is looked at than they allow.

    :param schema: that ``value`` is a part of; None looks for schemas in it.
    """
    objects: list[tuple[Mapping[str, Any], Mapping[str, Any] | None]] = []
    values = characters = levels = 0
    level: list[tuple[object, Mapping[str, Any] | None]] = [(value, schema)]
    while level:
        below: list[tuple[object, Mapping[str, Any] | None]] = []
        for node, root in level:
            if isinstance(node, Mapping):
                values += len(node)
                limits.JSON_VALUES.check(name, values)
                objects.append((node, root))
                for key, entry in node.items():
                    characters += len(key) if isinstance(key, str) else 0
                    begins = root is None and key in _SCHEMA_KEYS and isinstance(entry, Mapping)
                    below.append((entry, entry if begins else root))
            elif isinstance(node, (list, tuple)):
                values += len(node)
                limits.JSON_VALUES.check(name, values)
                below += [(entry, root) for entry in node]
            elif isinstance(node, str):
                characters += len(node)
        limits.JSON_CHARACTERS.check(name, characters)
        levels += any(isinstance(node, (Mapping, list, tuple)) for node, _ in level)
        limits.JSON_LEVELS.check(name, levels)
        level = below
    return objects


def _check_references(name: str, objects: list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> None:
    """Follow every reference to something that is none, each of them once."""
    settled: set[int] = set()
    for start, schema in objects:
        if schema is None:
            continue
        path: set[int] = set()
        current: Any = start
        while (reference := _reference(current)) is not None and id(current) not in settled:
            if id(current) in path:
                raise InvalidRequestError(f"{name}: the reference {reference[:80]!r} leads back to itself")
            path.add(id(current))
            current = _target(schema, reference)
        settled |= path


def _reference(node: object) -> str | None:
    reference = node.get("$ref") if isinstance(node, Mapping) else None
    return reference if isinstance(reference, str) else None


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """Return what a reference means; None if it is not in the schema: the grammar compiler says what is wrong then."""
    if not reference.startswith("#"):
        return None
    current: Any = schema
    pointer = reference[1:].strip("/")
    for part in pointer.split("/") if pointer else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(current, Mapping) or key not in current:
            return None
        current = current[key]
    return current
