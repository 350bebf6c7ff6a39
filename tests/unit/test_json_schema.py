"""JSON from requests: bounded in size, and judged in a time that grows with it and no faster."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker import InvalidRequestError, translation


class Counted(dict[str, Any]):
    """An object that counts how often anything looks into it."""

    looks = 0

    def __getitem__(self, key: str) -> Any:
        Counted.looks += 1
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        Counted.looks += 1
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        Counted.looks += 1
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        Counted.looks += 1
        return super().__iter__()


def counted(value: Any) -> Any:
    if isinstance(value, dict):
        return Counted({key: counted(entry) for key, entry in value.items()})
    return [counted(entry) for entry in value] if isinstance(value, list) else value


def chain(links: int) -> dict[str, Any]:
    """References that lead from one to the next, and in the end to something."""
    names = [f"d{number}" for number in range(links)]
    following = {name: {"$ref": f"#/$defs/{after}"} for name, after in itertools.pairwise(names)}
    return {"$ref": "#/$defs/d0", "$defs": {**following, names[-1]: {"type": "string"}}}


def star(points: int) -> dict[str, Any]:
    """References that all lead to the same long chain."""
    return {**chain(points), "anyOf": [{"$ref": "#/$defs/d0"}] * points}


def looks(schema: dict[str, Any], wrapped: bool) -> int:
    Counted.looks = 0
    value = counted(schema)
    guide = {"structural_tag": counted({"format": {"type": "json_schema", "json_schema": value}})} if wrapped else None
    translation.guided_decoding(guide or {"json": value})
    return Counted.looks


@pytest.mark.parametrize("wrapped", [False, True], ids=["json", "structural_tag"])
@pytest.mark.parametrize("make", [chain, star])
def test_the_work_grows_with_the_schema_and_no_faster(make: Any, wrapped: bool) -> None:
    """It was the third power of the length of a chain: 106 kB held the event loop until the heartbeat ended it."""
    short, long = looks(make(50), wrapped), looks(make(200), wrapped)
    assert 0 < long <= 4.5 * short


@pytest.mark.parametrize("wrapped", [False, True], ids=["json", "structural_tag"])
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#/anyOf"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {**chain(3), "$defs": {"d0": {"$ref": "#/$defs/d1"}, "d1": {"$ref": "#/$defs/d0"}}},
    ],
)
def test_a_circle_is_refused_wherever_the_schema_stands(schema: dict[str, Any], wrapped: bool) -> None:
    guide = {"format": {"elements": [{"type": "json_schema", "json_schema": schema}]}}
    legacy = {"structures": [{"begin": "<a>", "schema": schema, "end": "</a>"}], "triggers": ["<a>"]}
    for given_ in [guide, legacy] if wrapped else [schema]:
        for value in (given_, json.dumps(given_)):
            with pytest.raises(InvalidRequestError, match="leads back to itself"):
                translation.guided_decoding({"structural_tag" if wrapped else "json": value})


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


#: A schema that is as large as can be in one respect, one that is too large, and what is said of it.
TOO_LARGE = {
    "levels": (nested(64), nested(65), "levels"),
    "many levels": (nested(64), nested(400), "levels"),
    "values": ({"enum": [1] * 16_000}, {"enum": [1] * 16_400}, "values"),
    "characters": ({"const": "x" * 262_000}, {"const": "x" * 262_200}, "characters"),
    "keys": ({"x" * 262_000: 1}, {"x" * 262_200: 1}, "characters"),
}


@pytest.mark.parametrize("kind", ["json", "structural_tag"])
@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_is_too_large_is_refused(case: str, kind: str) -> None:
    large, too_large, unit = TOO_LARGE[case]
    for form in (lambda value: value, json.dumps):
        assert translation.guided_decoding({kind: form(large)})
        with pytest.raises(InvalidRequestError, match=rf"guided_decoding\.{kind}: .* {unit}.* at most"):
            translation.guided_decoding({kind: form(too_large)})


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 50_000, '{"a": ' + "1" * 200_000 + "}", "[", "3", '"a"'])
@pytest.mark.parametrize("kind", ["json", "structural_tag"])
def test_text_that_is_no_schema_is_refused(text: str, kind: str) -> None:
    """Python's own parser gives up with an error of its own on what is nested too deep."""
    with pytest.raises(InvalidRequestError, match=rf"guided_decoding\.{kind}"):
        translation.guided_decoding({kind: text})


#: Schemas whose references lead anywhere: in circles, to nothing, through properties that are called "$ref".
_TARGETS = st.sampled_from(["#", "#/", "#/$defs/a", "#/$defs/b", "#/$defs/c", "#/nowhere", "other.json", "#/$defs", 3])
_NODES = st.recursive(
    st.fixed_dictionaries({"$ref": _TARGETS}) | st.just({"type": "string"}),
    lambda inner: st.fixed_dictionaries({"items": inner}) | st.fixed_dictionaries({"anyOf": st.lists(inner)}),
    max_leaves=4,
)
_SCHEMAS = st.fixed_dictionaries(
    {"$defs": st.dictionaries(st.sampled_from("abc"), _NODES)}, optional={"$ref": _TARGETS, "items": _NODES}
)


def leads_nowhere(schema: dict[str, Any]) -> bool:
    """Follow every reference, as simple as can be: more steps than there are nodes are a circle."""

    def target(reference: str) -> Any:
        node: Any = schema
        for part in [part for part in reference.lstrip("#").strip("/").split("/") if part]:
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def nodes(node: Any) -> Iterator[Any]:
        yield node
        for entry in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from nodes(entry)

    everything = list(nodes(schema))
    for node in everything:
        steps = 0
        while isinstance(node, dict) and isinstance(node.get("$ref"), str) and node["$ref"].startswith("#"):
            node, steps = target(node["$ref"]), steps + 1
            if steps > len(everything):
                return True
    return False


@given(_SCHEMAS)
@settings(max_examples=300, deadline=None)
def test_circles_are_refused_and_nothing_else_is(schema: dict[str, Any]) -> None:
    try:
        translation.guided_decoding({"json": schema})
    except InvalidRequestError:
        assert leads_nowhere(schema)
    else:
        assert not leads_nowhere(schema)
