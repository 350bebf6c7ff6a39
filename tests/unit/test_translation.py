"""Reading requests: every field is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker import InvalidRequestError, translation
from dynamo_worker.translation import FRONTEND, ModelTable, RequestTable

TABLE = RequestTable(
    sampling={
        "temperature": ("temp", translation.number),
        "n": ("n", translation.integer),
        "best_of": ("", translation.integer),
        "length_penalty": ("", translation.unsupported(1)),
        "guided_decoding": ("guide", lambda _, value: translation.guided_decoding(value)),
    },
    stop={
        "max_tokens": ("max_tokens", translation.length),
        "stop": FRONTEND,
        "stop_token_ids": ("stop", translation.tokens),
        "stop_token_ids_hidden": ("stop", translation.tokens),
        "ignore_eos": ("ignore_eos", translation.boolean),
    },
    output={"logprobs": ("logprobs", translation.count)},
    extra={"logit_bias": ("bias", translation.logit_bias)},
    handled=frozenset({"kv_hint"}),
)


def read(defaults: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return TABLE.read({"model": "m", "token_ids": [1, 2, 3], **sections}, defaults or {})


def test_what_is_named_arrives_under_the_engines_name() -> None:
    values = read(
        {"temp": 0.1, "top": 3},
        sampling_options={"temperature": 0.5, "n": None},
        stop_conditions={"max_tokens": 4.0, "stop": ["x"], "stop_token_ids": [1], "stop_token_ids_hidden": [2]},
        output_options={"logprobs": 2**32 - 1},
        extra_args={"sampling_options": {"logit_bias": {"5": 200, "6": -1}}},
        kv_hint={"source": "x"},
    )
    assert values == {
        "temp": 0.5,
        "top": 3,
        "max_tokens": 4,
        "stop": [1, 2],
        "logprobs": -1,
        "bias": {5: 100.0, 6: -1.0},
    }


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"sampling_options": {"new": 1}}, "sampling_options.new is not supported"),
        ({"stop_conditions": {"new": 1}}, "stop_conditions.new is not supported"),
        ({"extra_args": {"sampling_options": {"temperature": 1}}}, "extra_args.sampling_options.temperature"),
        ({"multi_modal_data": {"image": 1}}, "multi_modal_data is not supported"),
        ({"sampling_options": {"length_penalty": 2}}, "sampling_options.length_penalty = 2 is not supported"),
        ({"sampling_options": {"n": 2, "best_of": 3}}, "sampling_options.best_of = 3"),
        ({"sampling_options": {"temperature": float("nan")}}, "temperature: a finite number"),
        ({"sampling_options": {"temperature": True}}, "temperature: a finite number"),
        ({"sampling_options": {"n": 1.5}}, "n: an integer"),
        ({"sampling_options": {"n": 2**64}}, "n: a 64-bit integer"),
        ({"stop_conditions": {"max_tokens": -1}}, "max_tokens: a number of tokens"),
        ({"stop_conditions": {"ignore_eos": 1}}, "ignore_eos: true or false"),
        ({"stop_conditions": {"stop_token_ids": "x"}}, "stop_token_ids: a list of tokens"),
        ({"output_options": {"logprobs": -2}}, "logprobs: a number of tokens"),
        ({"extra_args": {"sampling_options": {"logit_bias": {"x": 1}}}}, "logit_bias: an object"),
        ({"extra_args": {"sampling_options": {"logit_bias": [1]}}}, "logit_bias: an object"),
        ({"sampling_options": [1]}, "sampling_options: an object"),
        ({"extra_args": {"sampling_options": 3}}, "sampling_options: an object"),
    ],
)
def test_refused_by_name(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named.replace(".", r"\.")):
        read(**sections)


def test_values_that_ask_for_nothing() -> None:
    assert read(sampling_options={"length_penalty": 1.0, "best_of": 1}, multi_modal_data=None, encoder_result={}) == {}


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (translation.string, [("a", "a")], [1, None, ["a"]]),
        (translation.strings, [("a", ["a"]), (("a", "b"), ["a", "b"]), ([], [])], [1, ["a", 1], {"a": 1}]),
        (translation.mapping, [({"a": 1}, {"a": 1})], [[1], "a"]),
    ],
)
def test_readers_for_what_only_one_engine_has(read: Any, good: list[Any], bad: list[Any]) -> None:
    for value, expected in good:
        assert read("x", value) == expected
    for value in bad:
        with pytest.raises(InvalidRequestError, match=r"x: .* is needed"):
            read("x", value)


@pytest.mark.parametrize(("asked", "given"), [(None, 7), (5, 5), (7, 7), (8, 7), (0, None)])
def test_an_answer_fits_into_the_context(asked: int | None, given: int | None) -> None:
    table = ModelTable(TABLE, {"temp": 0.1}, context_length=10)
    values = table.read({"token_ids": [1, 2, 3], "stop_conditions": {"max_tokens": asked}})
    assert values == (None if given is None else {"temp": 0.1, "max_tokens": given})


def test_a_model_with_a_limit_of_its_own() -> None:
    table = ModelTable(TABLE, {"max_tokens": 4}, context_length=10)
    assert table.read({"token_ids": [1]}) == {"max_tokens": 4}
    assert table.read({"token_ids": [1], "stop_conditions": {"max_tokens": 6}}) == {"max_tokens": 6}


def test_a_prompt_that_leaves_no_room() -> None:
    table = ModelTable(TABLE, {}, context_length=10)
    assert table.read({"token_ids": [1] * 9}) == {"max_tokens": 1}
    with pytest.raises(InvalidRequestError, match=r"10 tokens.*context length is 10"):
        table.read({"token_ids": [1] * 10})


GUIDES: dict[str, Any] = {
    "json": {"type": "object"},
    "regex": "a+",
    "choice": ["yes", "no"],
    "grammar": 'root ::= "a"',
}


@pytest.mark.parametrize("kind", GUIDES)
def test_guided_decoding(kind: str) -> None:
    assert translation.guided_decoding({kind: GUIDES[kind], "backend": None}) == {kind: GUIDES[kind]}


def test_guided_decoding_by_structural_tag_is_json_text() -> None:
    assert translation.guided_decoding({"structural_tag": {"a": 1}}) == {"structural_tag": '{"a": 1}'}


def test_guided_decoding_of_nothing() -> None:
    assert translation.guided_decoding(dict.fromkeys(GUIDES)) == {}
    assert translation.guided_decoding({"whitespace_pattern": " "}) == {}


WRONG_GUIDES: dict[str, Any] = {
    "a backend": {"json": {}, "backend": "outlines"},
    "no choice": {"choice": []},
    "choice of numbers": {"choice": [1]},
    "no object": {"json": 3},
    "no JSON": {"json": "{"},
    "JSON, but no object": {"json": "[1]"},
    "regex that is none": {"regex": 3},
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
        translation.guided_decoding(WRONG_GUIDES[case])


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
    assert translation.guided_decoding({"json": schema}) == {"json": schema}


def test_priority() -> None:
    assert translation.priority({"routing": {"priority": 3}}) == 3
    assert translation.priority({"routing": None}) == 0
    with pytest.raises(InvalidRequestError, match="priority"):
        translation.priority({"routing": {"priority": "high"}})


@pytest.mark.parametrize(
    "where",
    [
        {"routing": {"cache_salt": "s"}},
        {"nvext": {"cache_salt": "s"}},
        {"extra_args": {"nvext": {"cache_salt": "s"}}},
    ],
)
def test_cache_salt(where: dict[str, Any]) -> None:
    assert translation.cache_salt(where) == "dynamo-cache-salt:s"
    assert translation.cache_salt({}) is None
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        translation.cache_salt({"routing": {"cache_salt": 3}})


def test_session() -> None:
    assert translation.session_id({"agent_context": {"session_id": " a "}}) == "a"
    assert translation.session_id({"agent_context": {"session_id": ""}}) is None


def test_the_routers_adapter_comes_before_the_model() -> None:
    assert translation.adapter_name({"model": "m", "routing": {"lora_name": "a"}}) == "a"
    assert translation.adapter_name({"model": "m"}) == "m"
    assert translation.adapter_name({"model": None}) is None


def test_a_canary() -> None:
    tokenizer, config = SimpleNamespace(bos_token_id=None, eos_token_id=3), SimpleNamespace(bos_token_id=[1, 2])
    assert translation.canary(tokenizer, config)["token_ids"] == [3]
    assert translation.canary(tokenizer, SimpleNamespace(bos_token_id=7))["token_ids"] == [7]
    both = SimpleNamespace(bos_token_id=5), SimpleNamespace(bos_token_id=7)
    assert translation.canary(*both, prompt_tokens=2)["token_ids"] == [5, 5]
    assert translation.canary(None, None)["token_ids"] == [0]
    assert translation.canary(None, None)["stop_conditions"]["max_tokens"] == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
_names = [*TABLE.sampling, *TABLE.stop, *TABLE.output, *TABLE.extra]
_sections = st.dictionaries(st.sampled_from(_names) | st.text(max_size=8), json_values, max_size=5) | json_values


@given(
    st.fixed_dictionaries(
        {"token_ids": st.just([1])},
        optional=dict.fromkeys(
            (
                "sampling_options",
                "stop_conditions",
                "output_options",
                "extra_args",
                "routing",
                "nvext",
                "agent_context",
            ),
            _sections,
        ),
    )
)
@settings(max_examples=300, deadline=None)
def test_any_request_is_read_or_refused(body: dict[str, Any]) -> None:
    """Nothing else is ever raised."""
    try:
        TABLE.read(body, {})
        translation.cache_salt(body)
        translation.priority(body)
        translation.session_id(body)
        translation.adapter_name(body)
    except InvalidRequestError:
        return
