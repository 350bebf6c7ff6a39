"""JSON from requests: bounded in size, and judged in a time that grows with it and no faster."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import guided_decoding, json_schema


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
    guided_decoding.read(guide or {"json": value})
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
                guided_decoding.read({"structural_tag" if wrapped else "json": value})


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
        assert guided_decoding.read({kind: form(large)})
        with pytest.raises(InvalidRequestError, match=rf"guided_decoding\.{kind}: .* {unit}.* at most"):
            guided_decoding.read({kind: form(too_large)})


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 50_000, '{"a": ' + "1" * 200_000 + "}", "[", "3", '"a"'])
@pytest.mark.parametrize("kind", ["json", "structural_tag"])
def test_text_that_is_no_schema_is_refused(text: str, kind: str) -> None:
    """Python's own parser gives up with an error of its own on what is nested too deep."""
    with pytest.raises(InvalidRequestError, match=rf"guided_decoding\.{kind}"):
        guided_decoding.read({kind: text})


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
        guided_decoding.read({"json": schema})
    except InvalidRequestError:
        assert leads_nowhere(schema)
    else:
        assert not leads_nowhere(schema)


# ------------------------------------------------------------------------------------ ways through references, patterns


def linked(links: int, step: Any) -> dict[str, Any]:
    """Definitions that lead from one to the next in some way."""
    steps = {f"d{number}": step({"$ref": f"#/$defs/d{number + 1}"}) for number in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{links}": {"type": "string"}}}


#: Ways from one definition to the next, and how many levels each is.
STEPS = {
    "reference": (lambda next_: next_, 1),
    "property": (lambda next_: {"properties": {"x": next_}}, 3),
    "item": (lambda next_: {"items": next_}, 2),
    "all of": (lambda next_: {"allOf": [next_]}, 3),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_way_through_references_has_an_end(step: str) -> None:
    """Grammar compilers follow it on the stack: 4000 properties or 1500 in other orders ended the worker by SIGSEGV."""
    make, levels = STEPS[step]
    most = 1000 // levels
    json_schema.check_schema("s", linked(most, make))
    with pytest.raises(InvalidRequestError, match=r"s: \d+ levels are too many, at most 1024"):
        json_schema.check_schema("s", linked(most + 30, make))
    tag = {"format": {"type": "json_schema", "json_schema": linked(most + 30, make)}}
    with pytest.raises(InvalidRequestError, match=r"s: \d+ levels are too many, at most 1024"):
        json_schema.check_structural_tag("s", tag)


def test_what_refers_to_itself_in_circles_is_no_endless_way() -> None:
    node = {"properties": {"next": {"$ref": "#/$defs/node"}, "value": {"$ref": "#"}}}
    json_schema.check_schema("s", {"$ref": "#/$defs/node", "$defs": {"node": node}})
    circle = linked(250, lambda next_: {"properties": {"x": next_}})
    circle["$defs"]["d250"] = {"items": {"$ref": "#/$defs/d0"}}
    json_schema.check_schema("s", circle)
    circle = linked(350, lambda next_: {"properties": {"x": next_}})
    circle["$defs"]["d350"] = {"items": {"$ref": "#/$defs/d0"}}
    with pytest.raises(InvalidRequestError, match="levels are too many"):
        json_schema.check_schema("s", circle)


def test_wide_is_not_deep() -> None:
    """Two thousand definitions that all stand in one."""
    names = {f"d{number}": {"type": "string"} for number in range(2000)}
    uses = {name: {"$ref": f"#/$defs/{name}"} for name in names}
    json_schema.check_schema("s", {"properties": uses, "$defs": names})
    too_many = {f"e{number}": {"$ref": f"#/{number}"} for number in range(2049)}
    with pytest.raises(InvalidRequestError, match="2049 references are too many"):
        json_schema.check_schema("s", {"properties": too_many})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sets(st.integers(0, 6))), min_size=7, max_size=7))
def test_no_way_is_longer_than_it_is_said_to_be(parts: list[tuple[int, set[int]]]) -> None:
    def longest(at: int, been: frozenset[int]) -> int:
        weight, leads = parts[at]
        return weight + max((longest(other, been | {other}) for other in leads - been), default=0)

    def reach(at: int) -> set[int]:
        found, waiting = set(), [at]
        while waiting:
            for other in parts[waiting.pop()][1] - found:
                found.add(other)
                waiting.append(other)
        return found

    simple = max(longest(at, frozenset({at})) for at in range(7))
    said = json_schema._heaviest_path([weight for weight, _ in parts], [leads for _, leads in parts])
    assert said >= simple
    if not any(at in reach(at) for at in range(7)):
        assert said == simple
    assert said <= sum(weight for weight, _ in parts)


@pytest.mark.parametrize(
    ("expression", "accepted"),
    [
        ("a?" * 256, True),
        ("a?" * 257, False),
        ("(a|)" * 257, False),
        ("(|a)" * 257, False),
        ("a{0,9}" * 257, False),
        ("|".join(["word"] * 1500), True),
        (r"\?\*\+" * 500, True),
        ("[?*+{]" * 500, True),
        ("(?:a)" * 500, True),
        ("[" * 8192, True),
        ("(" * 4096 + ")" * 4096, True),
        ("(" * 4096 + ")" * 4097, False),
    ],
)
def test_regular_expressions_are_short_and_have_few_optional_parts(expression: str, accepted: bool) -> None:
    """One parenthesis in 30 000 others ended the process; 1000 times `a?` made every token of a batch 0.7 s late."""
    in_tag = {"type": "regex", "pattern": expression}
    for guide in (
        {"regex": expression},
        {"json": {"type": "string", "pattern": expression}},
        {"json": json.dumps({"properties": {"x": {"propertyNames": {"pattern": expression}}}})},
        {"json": {"patternProperties": {expression: {"type": "string"}}}},
        {"structural_tag": {"format": in_tag}},
        {"structural_tag": {"format": {"type": "json_schema", "json_schema": {"pattern": expression}}}},
    ):
        if accepted:
            guided_decoding.read(guide)
        else:
            with pytest.raises(InvalidRequestError, match="at most"):
                guided_decoding.read(guide)
