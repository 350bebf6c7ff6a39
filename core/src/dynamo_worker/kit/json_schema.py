"""Checks of JSON that engines and their grammar compilers lack: its size, its references, and its patterns.

The compilers recurse on the stack of the process: a long path through a schema or a pattern ends it with SIGSEGV.

All checks run on the event loop and take time linear in their input, whose size is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import request_limits as limits

#: The keys of a structural tag that hold schemas.
_SCHEMA_KEYS: Final = frozenset({"schema", "json_schema"})
#: Group 1 matches what makes a part of a regular expression optional or repeats it. The alternatives before it skip the
#: same characters in escapes, in sets (an unclosed set skips the rest, which keeps the search linear), and after the
#: opening parenthesis of a group.
_QUANTIFIER: Final = re.compile(r"\\.|\[(?:\\.|[^]\\])*\]?|\(\?|([?*+{]|\|(?=[|)]|$)|(?<=[(|])\|)", re.DOTALL)


def check_schema(name: str, schema: str | Mapping[str, Any]) -> None:
    """Refuse a JSON schema that is too large, or in which a chain of references leads back to itself.

    No text satisfies such a schema, and grammar compilers loop forever.

    :param name: the field's name, for the message.
    :raises InvalidRequestError: the schema is too large or circular, or not a JSON object.
    """
    parsed = _parsed(name, schema)
    _check_references(name, _walk(name, parsed, parsed))


def check_structural_tag(name: str, tag: str | Mapping[str, Any]) -> None:
    """Check a structural tag and the schemas in it like :func:`check_schema`."""
    _check_references(name, _walk(name, _parsed(name, tag)))


def check_regex(name: str, expression: str) -> None:
    """Refuse a regular expression that is too long, or whose optional parts would slow down every token.

    :raises InvalidRequestError: it is too long or has too many optional parts.
    """
    limits.REGEX_CHARACTERS.check(name, len(expression))
    limits.REGEX_QUANTIFIERS.check(name, sum(1 for match in _QUANTIFIER.finditer(expression) if match[1]))


def check_size(name: str, value: object) -> None:
    """Refuse JSON with too many characters, values or levels.

    :raises InvalidRequestError: it is too large.
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
        raise InvalidRequestError(f"{name}: expected an object, got JSON of another type")
    return parsed


def _walk(
    name: str, value: object, schema: Mapping[str, Any] | None = None
) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Return every object in a value, level by level, each with the schema that contains it, if any.

    The limits are checked meanwhile, so a value that exceeds them is not read further.

    :param schema: the schema that contains ``value``; None if it may contain schemas itself.
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
                    if key == "pattern" and isinstance(entry, str):
                        check_regex(f"{name}: a pattern", entry)
                    elif key == "patternProperties" and isinstance(entry, Mapping):
                        for expression in entry:
                            check_regex(f"{name}: a pattern", str(expression))
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
    """Refuse circular chains of references, and references that nest a schema too deeply.

    :param objects: what :func:`_walk` returned.
    """
    schemas = {id(schema): schema for _, schema in objects if schema is not None}
    references: dict[int, dict[str, Any]] = {number: {} for number in schemas}
    for node, schema in objects:
        reference = _reference(node)
        if schema is not None and reference is not None and reference not in references[id(schema)]:
            limits.JSON_REFERENCES.check(name, len(references[id(schema)]) + 1)
            references[id(schema)][reference] = _target(schema, reference)
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
            current = references[id(schema)].get(reference)
        settled |= path
    for number, schema in schemas.items():
        if references[number]:
            limits.JSON_WAY.check(name, _deepest_path(schema, references[number]))


def _deepest_path(schema: Mapping[str, Any], references: Mapping[str, Any]) -> int:
    """Return the most levels that a compiler recurses into a schema if it follows each reference once.

    The schema and each target of a reference are the vertices of a graph, weighted by their depth; an edge means that
    one contains or references the other. A path may pass through every vertex of a cycle, so their weights are added.
    """
    vertices = {id(target): number for number, target in enumerate(references.values(), 1) if _is_container(target)}
    weights = [0] * (len(references) + 1)
    edges: list[set[int]] = [set() for _ in weights]
    start = vertices.get(id(schema), 0)
    seen = {start}
    waiting: list[tuple[Any, int, int]] = [(schema, start, 1)]
    while waiting:
        node, vertex, depth = waiting.pop()
        weights[vertex] = max(weights[vertex], depth)
        reference = _reference(node)
        if reference is not None and id(references[reference]) in vertices:
            edges[vertex].add(vertices[id(references[reference])])
        for entry in node.values() if isinstance(node, Mapping) else node:
            if not _is_container(entry):
                continue
            other = vertices.get(id(entry))
            if other is None:
                waiting.append((entry, vertex, depth + 1))
                continue
            edges[vertex].add(other)
            if other not in seen:
                seen.add(other)
                waiting.append((entry, other, 1))
    return _heaviest_path(weights, edges)


def _heaviest_path(weights: Sequence[int], edges: Sequence[set[int]]) -> int:
    """Return the weight of the heaviest path through a graph.

    Each strongly connected component (found with Tarjan's algorithm, without recursion) counts as one vertex.
    """
    count = 0
    numbers, lowest, heaviest = ([0] * len(weights) for _ in range(3))
    stack: list[int] = []
    on_stack = [True] * len(weights)
    for start in range(len(weights)):
        path: list[tuple[int, Iterator[int]]] = []
        new: int | None = None if numbers[start] else start
        while path or new is not None:
            if new is not None:
                count += 1
                numbers[new] = lowest[new] = count
                stack.append(new)
                path.append((new, iter(edges[new])))
            vertex, successors = path[-1]
            new = None
            for other in successors:
                if not numbers[other]:
                    new = other
                    break
                if on_stack[other]:
                    lowest[vertex] = min(lowest[vertex], numbers[other])
            if new is not None:
                continue
            path.pop()
            if path:
                lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[vertex])
            if lowest[vertex] == numbers[vertex]:
                component = [stack.pop()]
                while component[-1] != vertex:
                    component.append(stack.pop())
                for member in component:
                    on_stack[member] = False
                beyond = max((heaviest[other] for member in component for other in edges[member]), default=0)
                weight = sum(weights[member] for member in component) + beyond
                for member in component:
                    heaviest[member] = weight
    return max(heaviest)


def _is_container(node: object) -> bool:
    """Return whether a value is an object or a list."""
    return isinstance(node, (Mapping, list, tuple))


def _reference(node: object) -> str | None:
    reference = node.get("$ref") if isinstance(node, Mapping) else None
    return reference if isinstance(reference, str) else None


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """Return the target of a reference, or None if the schema lacks it, which the grammar compiler reports."""
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
