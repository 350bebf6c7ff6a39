"""Guided decoding: constraints are returned checked, or refused by the name of the wrong part."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import guided_decoding

GUIDES: dict[str, Any] = {
    "json": {"type": "object"},
    "regex": "a+",
    "choice": ["yes", "no"],
    "grammar": 'root ::= "a"',
}


@pytest.mark.parametrize("kind", GUIDES)
def test_guided_decoding(kind: str) -> None:
    assert guided_decoding.read({kind: GUIDES[kind], "backend": None}) == {kind: GUIDES[kind]}


def test_guided_decoding_by_structural_tag_is_json_text() -> None:
    assert guided_decoding.read({"structural_tag": {"a": 1}}) == {"structural_tag": '{"a": 1}'}


def test_guided_decoding_of_nothing() -> None:
    assert guided_decoding.read(dict.fromkeys(GUIDES)) == {}
    assert guided_decoding.read({"whitespace_pattern": " "}) == {}


WRONG_GUIDES: dict[str, Any] = {
    "a backend": {"json": {}, "backend": "outlines"},
    "no choice": {"choice": []},
    "choice of numbers": {"choice": [1]},
    "no object": {"json": 3},
    "no JSON": {"json": "{"},
    "JSON, but no object": {"json": "[1]"},
    "regex that is none": {"regex": 3},
    "choice that is none": {"choice": {"a": 1}},
    "structural tag that is none": {"structural_tag": [1]},
    "structural tag that is no JSON": {"structural_tag": "{"},
    "unknown": {"lark": "x"},
    "not even an object": [1],
    "itself": {"json": {"$ref": "#"}},
    "in a circle": {
        "json": {
            "properties": {"a": {"$ref": "#/$defs/x"}},
            "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}},
        }
    },
}


@pytest.mark.parametrize("case", WRONG_GUIDES)
def test_wrong_guides(case: str) -> None:
    with pytest.raises(InvalidRequestError, match="guided_decoding"):
        guided_decoding.read(WRONG_GUIDES[case])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
        {"$ref": "#/nowhere"},
        {"$ref": "other.json#/x"},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}},
    ],
)
def test_schemas_that_get_on(schema: dict[str, Any]) -> None:
    assert guided_decoding.read({"json": schema}) == {"json": schema}


def test_one_constraint_as_text() -> None:
    read_one = guided_decoding.read_one
    assert read_one({"json": {"type": "object"}}) == {"json": '{"type": "object"}'}
    assert read_one({"json": "{}"}) == {"json": "{}"}
    assert read_one({"choice": ["yes", "n.o"]}) == {"regex": r"(yes|n\.o)"}
    assert read_one({"grammar": 'root ::= "a"'}) == {"grammar": 'root ::= "a"'}
    assert read_one({}) == {}
    with pytest.raises(InvalidRequestError, match="only one of json, regex can be given"):
        read_one({"regex": "a", "json": {}})
    with pytest.raises(InvalidRequestError, match=r"whitespace_pattern is not supported by this engine; --flag$"):
        read_one({"json": {}, "whitespace_pattern": " "}, whitespace="--flag")
