"""The translation table: every field of a Dynamo request is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_worker import InvalidRequestError
from dynamo_worker_vllm import sampling
from dynamo_worker_vllm.sampling import SamplingTable

CONTEXT_LENGTH = 100
TABLE = SamplingTable({}, CONTEXT_LENGTH)


def request(**sections: Any) -> dict[str, Any]:
    return {"model": "tiny", "token_ids": [5, 6, 7], **sections}


def translated(**sections: Any) -> Any:
    params = TABLE.translate(request(**sections))
    assert params is not None
    return params


#: A value for every field, and what it becomes.
PASSED_ON = {
    ("sampling_options", "n"): (2, "n", 2),
    ("sampling_options", "presence_penalty"): (0.5, "presence_penalty", 0.5),
    ("sampling_options", "frequency_penalty"): (-0.5, "frequency_penalty", -0.5),
    ("sampling_options", "repetition_penalty"): (1.25, "repetition_penalty", 1.25),
    ("sampling_options", "temperature"): (0.5, "temperature", 0.5),
    ("sampling_options", "top_p"): (0.5, "top_p", 0.5),
    ("sampling_options", "top_k"): (7, "top_k", 7),
    ("sampling_options", "min_p"): (0.25, "min_p", 0.25),
    ("sampling_options", "seed"): (42, "seed", 42),
    ("stop_conditions", "max_tokens"): (9, "max_tokens", 9),
    ("stop_conditions", "min_tokens"): (4, "min_tokens", 4),
    ("stop_conditions", "stop_token_ids"): ([3, 4], "stop_token_ids", [3, 4]),
    ("stop_conditions", "stop_token_ids_visible"): ([3, 4], "stop_token_ids", [3, 4]),
    ("stop_conditions", "stop_token_ids_hidden"): ([3, 4], "stop_token_ids", [3, 4]),
    ("stop_conditions", "ignore_eos"): (True, "ignore_eos", True),
    ("stop_conditions", "max_thinking_tokens"): (11, "thinking_token_budget", 11),
    ("output_options", "logprobs"): (3, "logprobs", 3),
    ("output_options", "prompt_logprobs"): (2, "prompt_logprobs", 2),
}
LEFT_TO_THE_FRONTEND = {
    ("sampling_options", "include_stop_str_in_output"): True,
    ("stop_conditions", "stop"): ["END"],
    ("output_options", "skip_special_tokens"): False,
    ("output_options", "formatted_prompt"): True,
    ("output_options", "return_tokens_as_token_ids"): True,
    ("output_options", "no_stop_trim"): True,
}
REFUSED = {
    ("sampling_options", "best_of"): 4,
    ("sampling_options", "use_beam_search"): True,
    ("sampling_options", "length_penalty"): 2.0,
}
#: The values of the refused fields that ask for nothing.
HARMLESS = {
    ("sampling_options", "best_of"): 1,
    ("sampling_options", "use_beam_search"): False,
    ("sampling_options", "length_penalty"): 1.0,
}
#: What Dynamo 1.6.1 sends (`dynamo.md` §C).
DYNAMO = {
    "sampling_options": [
        "n",
        "best_of",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "use_beam_search",
        "length_penalty",
        "include_stop_str_in_output",
        "guided_decoding",
    ],
    "stop_conditions": [
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "stop_token_ids_visible",
        "stop_token_ids_hidden",
        "ignore_eos",
        "max_thinking_tokens",
    ],
    "output_options": [
        "logprobs",
        "prompt_logprobs",
        "skip_special_tokens",
        "formatted_prompt",
        "return_tokens_as_token_ids",
        "no_stop_trim",
    ],
}
SECTIONS = {
    "sampling_options": sampling.SAMPLING,
    "stop_conditions": sampling.STOP,
    "output_options": sampling.OUTPUT,
}


@pytest.mark.parametrize("section", DYNAMO)
def test_every_field_of_dynamo_is_in_the_table(section: str) -> None:
    assert set(SECTIONS[section]) == set(DYNAMO[section])
    tested = {name for where, name in (*PASSED_ON, *LEFT_TO_THE_FRONTEND, *REFUSED) if where == section}
    assert tested | {"guided_decoding"} >= set(DYNAMO[section])


@pytest.mark.parametrize("field", PASSED_ON, ids="-".join)
def test_passed_on(field: tuple[str, str]) -> None:
    section, name = field
    value, target, expected = PASSED_ON[field]
    result = getattr(translated(**{section: {name: value}}), target)
    assert (sorted(result) if isinstance(result, list) else result) == expected


@pytest.mark.parametrize("field", PASSED_ON, ids="-".join)
def test_null_is_the_default(field: tuple[str, str]) -> None:
    section, name = field
    target = PASSED_ON[field][1]
    assert getattr(translated(**{section: {name: None}}), target) == getattr(translated(), target)


@pytest.mark.parametrize("field", LEFT_TO_THE_FRONTEND, ids="-".join)
def test_left_to_the_frontend(field: tuple[str, str]) -> None:
    section, name = field
    assert translated(**{section: {name: LEFT_TO_THE_FRONTEND[field]}}) == translated()


@pytest.mark.parametrize("field", REFUSED, ids="-".join)
def test_refused_by_name(field: tuple[str, str]) -> None:
    section, name = field
    with pytest.raises(InvalidRequestError, match=f"{section}.{name}"):
        TABLE.translate(request(**{section: {name: REFUSED[field]}}))
    assert translated(**{section: {name: HARMLESS[field]}}) == translated()


@pytest.mark.parametrize("section", [*DYNAMO, "guided_decoding"])
def test_an_unknown_field_is_refused_by_name(section: str) -> None:
    body = {"sampling_options": {section: {"new": 1}}} if section == "guided_decoding" else {section: {"new": 1}}
    with pytest.raises(InvalidRequestError, match=f"{section}.new is not supported"):
        TABLE.translate(request(**body))


@pytest.mark.parametrize("name", ["prompt_embeds", "multi_modal_data", "encoder_result", "something_new"])
def test_what_a_text_model_cannot_do_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        TABLE.translate(request(**{name: {"image": "x"}}))
    assert translated(**{name: None}) == translated()


def test_only_deltas_and_no_text() -> None:
    params = translated()
    assert params.detokenize is False
    assert params.output_kind.name == "DELTA"


def test_without_max_tokens_the_context_is_the_limit() -> None:
    assert translated().max_tokens == CONTEXT_LENGTH - 3


def test_the_models_defaults_and_what_overrides_them() -> None:
    table = SamplingTable({"temperature": 0.6, "top_k": 20, "max_tokens": 30}, CONTEXT_LENGTH)
    params = table.translate(request(sampling_options={"temperature": 0.2, "top_k": None}))
    assert params is not None
    assert (params.temperature, params.top_k, params.max_tokens) == (0.2, 20, 30)


def test_no_tokens_at_all() -> None:
    """After a migration nothing may be left to generate."""
    assert TABLE.translate(request(stop_conditions={"max_tokens": 0})) is None


@pytest.mark.parametrize("tokens", [CONTEXT_LENGTH, CONTEXT_LENGTH + 1, 10 * CONTEXT_LENGTH])
def test_a_prompt_that_is_too_long(tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{tokens} tokens.*context length is {CONTEXT_LENGTH}"):
        TABLE.translate({"token_ids": [5] * tokens})


def test_the_whole_vocabulary() -> None:
    assert translated(output_options={"logprobs": 2**32 - 1}).logprobs == -1


def test_all_stop_tokens_together() -> None:
    conditions = {"stop_token_ids": [3], "stop_token_ids_visible": [4], "stop_token_ids_hidden": [5]}
    assert sorted(translated(stop_conditions=conditions).stop_token_ids) == [3, 4, 5]


@pytest.mark.parametrize("section", ["sampling_options", "stop_conditions", "output_options", "extra_args"])
def test_a_section_that_is_no_object(section: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{section}: an object"):
        TABLE.translate(request(**{section: [1]}))


# --- guided decoding


GUIDED = {
    "json": {"type": "object"},
    "regex": "a+",
    "choice": ["yes", "no"],
    "grammar": 'root ::= "a"',
    "structural_tag": {"type": "structural_tag"},
}


@pytest.mark.parametrize("kind", GUIDED)
def test_guided_decoding(kind: str) -> None:
    params = translated(sampling_options={"guided_decoding": {kind: GUIDED[kind], "backend": None}})
    expected = '{"type": "structural_tag"}' if kind == "structural_tag" else GUIDED[kind]
    assert getattr(params.structured_outputs, kind) == expected


def test_guided_decoding_of_nothing() -> None:
    assert translated(sampling_options={"guided_decoding": dict.fromkeys(GUIDED)}).structured_outputs is None


WRONG_GUIDES: dict[str, Any] = {
    "two at once": {"regex": "a", "json": {}},
    "a backend": {"json": {}, "backend": "outlines"},
    "in a circle": {"json": {"$ref": "#"}},
}


@pytest.mark.parametrize("case", WRONG_GUIDES)
def test_wrong_guides(case: str) -> None:
    with pytest.raises(InvalidRequestError, match="guided_decoding"):
        TABLE.translate(request(sampling_options={"guided_decoding": WRONG_GUIDES[case]}))


def test_a_schema_that_nests_itself_gets_on() -> None:
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    assert translated(sampling_options={"guided_decoding": {"json": tree}}).structured_outputs.json == tree


def test_kv_hints() -> None:
    action = {"action_id": "1", "action_type": "pin", "action_version": "1", "payload": {"blocks": 2}}
    hints = sampling.kv_hints(request(kv_hint={"protocol_version": "1", "message_id": "m", "actions": [action]}))
    assert hints is not None
    assert hints.actions[0].payload == {"blocks": 2}
    assert sampling.kv_hints(request()) is None
    with pytest.raises(InvalidRequestError, match="kv_hint"):
        sampling.kv_hints(request(kv_hint={"actions": 3}))


# --- properties

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def _section(name: str) -> st.SearchStrategy[Any]:
    names = st.sampled_from(DYNAMO[name]) | st.text(max_size=8)
    return st.dictionaries(names, json_values, max_size=5) | json_values


anything = st.fixed_dictionaries(
    {"token_ids": st.lists(st.integers(0, 500), min_size=1, max_size=CONTEXT_LENGTH + 5)},
    optional={
        **{name: _section(name) for name in DYNAMO},
        "extra_args": json_values,
        "routing": json_values,
        "nvext": json_values,
        "agent_context": json_values,
    },
)


@given(anything)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_any_request_is_translated_or_refused(body: dict[str, Any]) -> None:
    """Nothing else is ever raised, and what is translated keeps vLLM's own rules."""
    try:
        params = TABLE.translate(body)
        sampling.kv_hints(body)
    except InvalidRequestError:
        return
    if params is not None:
        params.__post_init__()


in_range = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 2),
        "temperature": st.floats(0.1, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 1000),
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**63 - 1),
        "n": st.integers(1, 16),
    },
)


@given(in_range)
@settings(max_examples=300, deadline=None)
def test_what_is_allowed_arrives_unchanged(options: dict[str, Any]) -> None:
    params = translated(sampling_options=options)
    for name, value in options.items():
        assert math.isclose(getattr(params, name), value), name
