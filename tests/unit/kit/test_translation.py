"""Reading requests: every field is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields, guided_decoding, request_metadata, translation
from dynamo_worker.kit.translation import FRONTEND, ModelTable, RequestTable
from dynamo_worker.requests import Request

TABLE = RequestTable(
    sampling={
        "temperature": ("temp", fields.number),
        "n": ("n", fields.answer_count),
        "best_of": ("", fields.integer),
        "repetition_penalty": ("penalty", fields.repetition_penalty),
        "length_penalty": ("", fields.unsupported(1)),
        "guided_decoding": ("guide", lambda _, value: guided_decoding.read(value)),
    },
    stop={
        "max_tokens": ("max_tokens", fields.token_count),
        "stop": FRONTEND,
        "stop_token_ids": ("stop", fields.token_ids),
        "stop_token_ids_hidden": ("stop", fields.token_ids),
        "ignore_eos": ("ignore_eos", fields.boolean),
    },
    output={"logprobs": ("logprobs", fields.logprob_count), "prompt_logprobs": ("prompt", fields.logprob_count)},
    extra={
        "logit_bias": ("bias", fields.logit_bias),
        "allowed_token_ids": ("allowed", fields.allowed_token_ids),
        "custom": ("custom", fields.mapping),
    },
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
        ({"sampling_options": {"temperature": float("nan")}}, "temperature: expected a finite number"),
        ({"sampling_options": {"temperature": True}}, "temperature: expected a finite number"),
        ({"sampling_options": {"n": 1.5}}, "n: expected an integer"),
        ({"sampling_options": {"n": 2**64}}, "n: expected a 64-bit integer"),
        ({"sampling_options": {"n": 0}}, "n: expected a positive integer"),
        ({"sampling_options": {"temperature": 10**400}}, "temperature: expected a finite number"),
        ({"stop_conditions": {"stop_token_ids": [1, 2**64]}}, "stop_token_ids: expected a 64-bit integer"),
        ({"stop_conditions": {"stop_token_ids": [1, True]}}, "stop_token_ids: expected an integer"),
        ({"stop_conditions": {"max_tokens": -1}}, "max_tokens: expected a number of tokens"),
        ({"stop_conditions": {"ignore_eos": 1}}, "ignore_eos: expected true or false"),
        ({"stop_conditions": {"stop_token_ids": "x"}}, "stop_token_ids: expected a list of integers"),
        ({"output_options": {"logprobs": -2}}, "logprobs: expected -1 or a number of tokens"),
        ({"extra_args": {"sampling_options": {"logit_bias": {"x": 1}}}}, "logit_bias: expected an object"),
        ({"extra_args": {"sampling_options": {"logit_bias": [1]}}}, "logit_bias: expected an object"),
        ({"extra_args": {"sampling_options": {"logit_bias": {"1" * 21: 1}}}}, "logit_bias: expected an object"),
        ({"extra_args": {"sampling_options": {"logit_bias": {"2147483648": 1}}}}, "logit_bias: expected an object"),
        (
            {"sampling_options": {"repetition_penalty": 1e-40}},
            "repetition_penalty: expected a number of at least 0.001",
        ),
        ({"sampling_options": [1]}, "sampling_options: expected an object"),
        ({"extra_args": {"sampling_options": 3}}, "sampling_options: expected an object"),
    ],
)
def test_refused_by_name(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named.replace(".", r"\.")):
        read(**sections)


def extra(**options: Any) -> dict[str, Any]:
    return {"extra_args": {"sampling_options": options}}


def guide(**constraint: Any) -> dict[str, Any]:
    return {"sampling_options": {"guided_decoding": constraint}}


#: For every limit what is just accepted, and what is not.
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "n: 129 answers": ({"sampling_options": {"n": 128}}, {"sampling_options": {"n": 129}}),
    "n: 1000000 answers": ({"sampling_options": {"n": 1}}, {"sampling_options": {"n": 10**6}}),
    "stop_token_ids: 1025 tokens": (
        {"stop_conditions": {"stop_token_ids": [1] * 1024}},
        {"stop_conditions": {"stop_token_ids": [1] * 1025}},
    ),
    "allowed_token_ids: 262145 tokens": (
        extra(allowed_token_ids=[1] * 262_144),
        extra(allowed_token_ids=[1] * 262_145),
    ),
    "logit_bias: 4097 tokens": (
        extra(logit_bias={str(token): 1 for token in range(4096)}),
        extra(logit_bias={str(token): 1 for token in range(4097)}),
    ),
    "custom: 65 levels": (
        extra(custom={"a": {"b": [1]}}),
        extra(custom=functools.reduce(lambda a, _: {"a": a}, range(65), 1)),
    ),
    "custom: 262145 characters": (extra(custom={"a": "x" * 262_143}), extra(custom={"a": "x" * 262_144})),
    "regex: 8193 characters": (guide(regex="a" * 8192), guide(regex="a" * 8193)),
    "grammar: 65537 characters": (guide(grammar="a" * 65_536), guide(grammar="a" * 65_537)),
    "whitespace_pattern: 257 characters": (
        guide(json={}, whitespace_pattern=" " * 256),
        guide(json={}, whitespace_pattern=" " * 257),
    ),
    "choice: 10001 choices": (guide(choice=["a"] * 10_000), guide(choice=["a"] * 10_001)),
    "choice: 131073 characters": (guide(choice=["a" * 65_536] * 2), guide(choice=["a" * 65_536, "a" * 65_537])),
}


@pytest.mark.parametrize("message", LIMITS)
def test_what_is_too_long_is_refused(message: str) -> None:
    accepted, refused = LIMITS[message]
    assert read(**accepted)
    with pytest.raises(InvalidRequestError, match=f"{message} are too many, at most"):
        read(**refused)


@pytest.mark.parametrize("value", [[1] * 10**6, {str(number): 1 for number in range(10**5)}, "x" * 10**7, b"x" * 10**7])
def test_a_message_is_short_whatever_it_is_about(value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        read(sampling_options={"temperature": value, "length_penalty": value})
    assert len(str(raised.value)) < 200


def cpu(work: Callable[[], object]) -> float:
    """Return the least CPU time of a few runs, without the garbage collector's, which looks at all there is."""
    times = []
    gc.disable()
    try:
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    finally:
        gc.enable()
    return min(times)


#: The most that a request can say, divided by a number; of what is read entry by entry.
LONG: dict[str, Callable[[int], dict[str, Any]]] = {
    "stop tokens": lambda part: {"stop_conditions": {"stop_token_ids": list(range(1024 // part))}},
    "floats": lambda part: {"stop_conditions": {"stop_token_ids": [1.0] * (1024 // part)}},
    "allowed tokens": lambda part: extra(allowed_token_ids=list(range(2**18 // part))),
    "biases": lambda part: extra(logit_bias={str(token): 1 for token in range(4096 // part)}),
    "choices": lambda part: guide(choice=["a" * 13] * (10_000 // part)),
    "schema": lambda part: guide(json={"enum": [{"a": "b"}] * (8_000 // part)}),
    "text": lambda part: guide(json='{"enum": [' + ", ".join(['{"a": "b"}'] * (8_000 // part)) + "]}"),
    "tag": lambda part: guide(structural_tag={"tags": [{"schema": {"$ref": "#/a"}}] * (5_000 // part)}),
    "references": lambda part: guide(json={"anyOf": [{"$ref": "#/" + "a/" * 1000}] * (120 // part)}),
}


@pytest.mark.parametrize("case", LONG)
def test_the_time_grows_with_the_length_and_no_faster(case: str) -> None:
    short, long = LONG[case](4), LONG[case](1)
    ratio = 0.0
    for _ in range(5):  # whoever else uses this machine's caches disturbs the measurement
        ratio = cpu(lambda: [read(**long) for _ in range(4)]) / cpu(lambda: [read(**short) for _ in range(4)])
        if ratio < 8:
            break
    assert ratio < 8


def test_values_that_ask_for_nothing() -> None:
    assert read(sampling_options={"length_penalty": 1.0, "best_of": 1}, multi_modal_data=None, encoder_result={}) == {}


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


@pytest.mark.parametrize(
    ("prompt", "asked", "error"),
    [
        (1000, 131, "132000 log-probabilities are too many"),
        (131_073, 0, "131073 log-probabilities are too many"),
        (1, 131_072, "131073 log-probabilities are too many"),
        (1, 2**32 - 1, "the whole vocabulary"),
    ],
)
def test_log_probabilities_of_a_whole_prompt(prompt: int, asked: int, error: str) -> None:
    """They arrive all at once, and each is a Python object on the event loop."""
    table = ModelTable(TABLE, {}, context_length=200_000)
    request = {"token_ids": [1] * prompt, "output_options": {"prompt_logprobs": asked}}
    with pytest.raises(InvalidRequestError, match=f"prompt_logprobs: {error}"):
        table.read(request)
    for fits in (1000, 129), (65_536, 1), (131_072, 0):
        table.read({"token_ids": [1] * fits[0], "output_options": {"prompt_logprobs": fits[1]}})


def test_an_engine_states_only_where_it_differs() -> None:
    table = RequestTable.of_engine(
        sampling={"seed": ("random_seed", fields.integer)},
        stop={"max_tokens": ("limit", fields.token_count)},
        extra={"logit_bias": ("bias", fields.logit_bias)},
        handled=("kv_hint",),
    )
    assert set(table.sampling) == set(translation.SAMPLING)
    request = {
        "kv_hint": {"a": 1},
        "sampling_options": {"seed": 3, "top_k": 2},
        "stop_conditions": {"max_tokens": 5},
        "output_options": {"logprobs": 1},
        "extra_args": {"sampling_options": {"logit_bias": {"1": 1}, "min_p": 0.5}},
    }
    values = {"random_seed": 3, "top_k": 2, "limit": 5, "logprobs": 1, "bias": {1: 1.0}, "min_p": 0.5}
    assert table.read(request, {}) == values


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
        request_metadata.cache_salt(body)
        request_metadata.priority(body)
        request_metadata.session_id(body)
        request_metadata.lora_name(body)
    except InvalidRequestError:
        return


#: What the runtime's frontend may send and a text engine cannot ignore: refused unless the engine handles it.
UP_TO_THE_ENGINE = {
    *("prompt_embeds", "multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "media_io_kwargs"),
    *("image_cache_scope", "encoder_result", "require_reasoning"),
}


@pytest.mark.parametrize("name", sorted(Request.__annotations__.keys() - {"token_ids", "kv_hint"}))
def test_parts_of_a_request_are_handled_or_refused(name):
    """Clients may set `nvext.router` and `nvext.request_timestamp_ms`, which concern the router alone."""
    request = {"token_ids": [1], name: {"a": None}}
    if name in UP_TO_THE_ENGINE:
        with pytest.raises(InvalidRequestError, match=f"{name} is not supported by this engine"):
            TABLE.read(request, {})
    elif name in ("sampling_options", "stop_conditions", "output_options"):
        assert TABLE.read({**request, name: {}}, {}) == {}
    else:
        assert TABLE.read(request, {}) == {}
