"""Readers of single fields: each returns the value checked, or refuses it by the field's full name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (fields.string, [("a", "a")], [1, None, ["a"]]),
        (fields.rank, [(None, None), (0, 0), (2**32 - 1, 2**32 - 1)], ["0", -1, 2**32, [0]]),
        (fields.mapping, [({"a": 1}, {"a": 1})], [[1], "a"]),
    ],
)
def test_readers_for_what_only_one_engine_has(read: Any, good: list[Any], bad: list[Any]) -> None:
    for value, expected in good:
        assert read("x", value) == expected
    for value in bad:
        with pytest.raises(InvalidRequestError, match=r"x: expected .*, got "):
            read("x", value)


@pytest.mark.parametrize(
    ("reader", "value", "expected"),
    [
        (fields.integer, 4.0, 4),
        (fields.integer, -(2**63), -(2**63)),
        (fields.number, 1, 1.0),
        (fields.boolean, False, False),
        (fields.token_ids, (1, 2.0), [1, 2]),
        (fields.token_ids, [], []),
        (fields.answer_count, 128, 128),
        (fields.logprob_count, 2**32 - 1, -1),
        (fields.token_count, 2**31 - 1, 2**31 - 1),
        (fields.logit_bias, {"5": 200, 6: -1, "-7": -200}, {5: 100.0, 6: -1.0, -7: -100.0}),
        (fields.repetition_penalty, 0.001, 0.001),
        (fields.unsupported(False, None), False, None),
    ],
)
def test_accepted_values(reader: fields.Reader, value: Any, expected: Any) -> None:
    assert reader("x", value) == expected


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        (fields.integer, "4", "expected an integer, got '4'"),
        (fields.integer, True, "expected an integer, got True"),
        (fields.integer, 2**63, "expected a 64-bit integer, got 9223372036854775808"),
        (fields.integer, math.nan, "expected an integer, got nan"),
        (fields.number, math.inf, "expected a finite number, got inf"),
        (fields.number, None, "expected a finite number, got None"),
        (fields.boolean, 1, "expected true or false, got 1"),
        (fields.token_ids, [1, "2"], "expected an integer, got '2'"),
        (fields.answer_count, 0, "expected a positive integer, got 0"),
        (fields.logprob_count, -2, "expected -1 or a number of tokens, got -2"),
        (fields.token_count, 2**31, "expected a number of tokens, got 2147483648"),
        (fields.logit_bias, {"a": 1}, "expected an object of token ids and numbers, got a dict of length 1"),
        (fields.repetition_penalty, 0.0009, "expected a number of at least 0.001, got 0.0009"),
    ],
)
def test_refused_values(reader: fields.Reader, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        reader("options.x", value)
    assert str(raised.value) == f"options.x: {message}"


def test_a_repetition_penalty_of_zero_is_left_to_the_engine() -> None:
    assert fields.repetition_penalty("x", 0) == 0


def test_a_number_within_a_range() -> None:
    read = fields.number_within(0.5, 2)
    assert [read("x", value) for value in (0.5, 1, 2)] == [0.5, 1, 2]
    for value in (0.4, 2.1, math.inf, "1"):
        with pytest.raises(InvalidRequestError, match=r"^x: expected a (number from 0\.5 to 2|finite number), got"):
            read("x", value)


def test_an_unsupported_value_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="x = 2 is not supported by this engine"):
        fields.unsupported(1)("x", 2)


def test_sections() -> None:
    request = {"a": {"b": {"c": 1}}, "empty": None, "list": [1]}
    assert fields.section(request, "a", "b") == {"c": 1}
    assert fields.section(request, "empty", "b") == {}
    assert fields.section(request, "missing") == {}
    with pytest.raises(InvalidRequestError, match=r"list: expected an object, got a list of length 1"):
        fields.section(request, "list", "b")


def test_the_whole_vocabulary_counts_as_its_number_of_tokens() -> None:
    assert fields.logprobs_per_token("logprobs", -1, 100) == 100
    assert fields.logprobs_per_token("logprobs", 0, 100) == 0
    with pytest.raises(InvalidRequestError, match="logprobs: 129 log-probabilities are too many"):
        fields.logprobs_per_token("logprobs", -1, 129)
