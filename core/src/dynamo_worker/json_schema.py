"""A check of JSON schemas that grammar compilers lack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dynamo_worker.errors import InvalidRequestError


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
            raise InvalidRequestError("guided_decoding.json: a JSON schema is an object")
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
                return  # the grammar compiler says what is wrong with it
            current = current[key]
