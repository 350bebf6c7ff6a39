"""The translation table: every field of a Dynamo request is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.testing.translation import Translation
from dynamo_worker_sglang import sampling
from dynamo_worker_sglang.disaggregation import Role
from dynamo_worker_sglang.sampling import SamplingTable

VOCABULARY = 500


def table(defaults: Mapping[str, Any], *, deterministic: bool = True, custom: bool = False) -> SamplingTable:
    return SamplingTable(
        defaults, Translation.CONTEXT_LENGTH, VOCABULARY, deterministic=deterministic, custom_processors=custom
    )


class TestTranslation(Translation):
    TABLE: ClassVar = sampling.TABLE
    PASSED_ON: ClassVar = {
        **Translation.PASSED_ON,
        ("sampling_options", "seed"): (42, "sampling_seed", 42),
        ("stop_conditions", "max_tokens"): (9, "max_new_tokens", 9),
        ("stop_conditions", "min_tokens"): (4, "min_new_tokens", 4),
        ("output_options", "logprobs"): (3, "top_logprobs_num", 3),
        ("output_options", "prompt_logprobs"): (2, "logprob_start_len", 0),
    }
    GUIDES: ClassVar = {
        "json": ({"type": "object"}, {"json_schema": '{"type": "object"}'}),
        "regex": ("a+", {"regex": "a+"}),
        "choice": (["yes", "n.o"], {"regex": r"(yes|n\.o)"}),
        "grammar": ('root ::= "a"', {"ebnf": 'root ::= "a"'}),
        "structural_tag": ({"type": "structural_tag"}, {"structural_tag": '{"type": "structural_tag"}'}),
    }
    WRONG_GUIDES: ClassVar = {**Translation.WRONG_GUIDES, "white space": {"json": {}, "whitespace_pattern": " "}}

    def translate(self, request: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
        return table(defaults).translate(request)

    def value_of(self, translated: Any, name: str) -> Any:
        if name == "guided_decoding":
            grammars = ("json_schema", "regex", "ebnf", "structural_tag")
            return {kind: translated.sampling[kind] for kind in grammars if kind in translated.sampling}
        if name == "n":
            return translated.n
        if name in translated.options or name not in SamplingParams.__struct_fields__:
            return translated.options.get(name)
        value = getattr(SamplingParams(**translated.sampling), name)
        return sorted(value) if isinstance(value, set) else value

    def check(self, translated: Any) -> None:
        params = SamplingParams(**translated.sampling)
        params.verify(VOCABULARY)
        params.normalize(object())


def translated(*, deterministic: bool = True, custom: bool = False, **sections: Any) -> Any:
    result = table({}, deterministic=deterministic, custom=custom).translate({"token_ids": [5, 6, 7], **sections})
    assert result is not None
    return result


def test_a_seed_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"seed.*--enable-deterministic-inference"):
        translated(deterministic=False, sampling_options={"seed": 1, "temperature": 1.0})
    assert translated(deterministic=False, sampling_options={"seed": 1, "temperature": 0.0})


def test_the_whole_vocabulary_is_more_than_the_event_loop_can_carry() -> None:
    """Each alternative to each token is an object of Python's, made for all requests on one event loop."""
    for too_many in (-1, 2**32 - 1, 129):
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(InvalidRequestError, match=rf"output_options\.{name}: "):
                translated(output_options={name: too_many})
    options = translated(output_options={"logprobs": 128, "prompt_logprobs": 1})
    assert (options.top, options.prompt_top, options.options["top_logprobs_num"]) == (128, 1, 128)


def test_the_whole_of_a_small_vocabulary() -> None:
    small = SamplingTable({}, 100, 20).translate({"token_ids": [5], "output_options": {"logprobs": -1}})
    assert small is not None
    assert (small.top, small.options["top_logprobs_num"]) == (-1, 20)


def test_no_logprobs_are_made_unless_they_are_asked_for() -> None:
    assert "return_logprob" not in translated().options
    assert translated(output_options={"logprobs": 0}).options["return_logprob"]


def test_what_sglang_alone_has() -> None:
    custom = {"a": 1, "b": [1, "x", None], "c": {"d": True}}
    extra = {"sampling_options": {"logit_bias": {"7": 200}, "custom_params": custom}}
    sampled = translated(extra_args=extra).sampling
    assert sampled["logit_bias"] == {"7": 100.0}
    assert sampled["custom_params"] == custom
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        translated(extra_args={"sampling_options": {"logit_bias": {str(VOCABULARY): 1}}})
    with pytest.raises(InvalidRequestError, match=r"extra_args\.sampling_options\.token_ids_logprob"):
        translated(extra_args={"sampling_options": {"token_ids_logprob": [1]}})


@pytest.mark.parametrize("pattern", ["(a+)+$", ["a"]])
def test_a_pattern_that_the_scheduler_would_match_is_refused(pattern: Any) -> None:
    """One that never comes to an end takes all other requests with it."""
    with pytest.raises(InvalidRequestError, match=r"stop_regex is not supported.*use `stop`"):
        translated(extra_args={"sampling_options": {"stop_regex": pattern}})
    assert translated(extra_args={"sampling_options": {"stop_regex": []}}) == translated()


def test_code_is_taken_only_where_the_operator_allows_it() -> None:
    code = {"sampling_options": {"custom_logit_processor": '{"callable": "80"}'}}
    with pytest.raises(InvalidRequestError, match=r"custom_logit_processor.*--enable-custom-logit-processor"):
        translated(extra_args=code)
    assert translated(custom=True, extra_args=code).options == {"custom_logit_processor": '{"callable": "80"}'}
    with pytest.raises(InvalidRequestError, match="custom_logit_processor: 65537 characters"):
        translated(custom=True, extra_args={"sampling_options": {"custom_logit_processor": "x" * 65_537}})


@pytest.mark.parametrize("params", [{"a": {"b": {"c": 1}}}, {"a": [[1]]}, {"a": [{"b": 1}]}, {"a": "x" * 262_144}])
def test_what_the_scheduler_could_not_decode_never_gets_there(params: dict[str, Any]) -> None:
    """It would end: `msgspec.ValidationError`."""
    with pytest.raises(InvalidRequestError, match="custom_params"):
        translated(extra_args={"sampling_options": {"custom_params": params}})


@pytest.mark.parametrize("top_k", [2**30, 2**31, 2**62])
def test_no_top_k_is_beyond_the_schedulers_32_bits(top_k: int) -> None:
    sampled = translated(sampling_options={"top_k": top_k}).sampling
    assert torch.tensor([SamplingParams(**sampled).top_k], dtype=torch.int32).item() == TOP_K_ALL


def test_stop_tokens_that_there_are_not_are_left_out() -> None:
    """The scheduler uses them as places in a row of the vocabulary; none of them is ever generated."""
    stop = {"stop_token_ids": [3, VOCABULARY - 1, VOCABULARY, 2**40, -1]}
    assert translated(stop_conditions=stop).sampling["stop_token_ids"] == [3, VOCABULARY - 1]


def test_kv_hints_are_bounded() -> None:
    assert translated(kv_hint={"actions": []}).options == {"kv_hints": {"actions": []}}
    with pytest.raises(InvalidRequestError, match="kv_hint: 20000 values"):
        translated(kv_hint={"actions": [1] * 19_999})


# --- prefill and decode


def test_a_prefill_worker_says_where_the_two_meet() -> None:
    role = Role("prefill", ("10.0.0.1", 9000))
    request = translated(stop_conditions={"max_tokens": 50, "min_tokens": 5})
    role.prepare({"token_ids": [5]}, request)
    meeting = request.meeting
    assert meeting is not None
    assert (meeting["bootstrap_host"], meeting["bootstrap_port"]) == ("10.0.0.1", 9000)
    assert request.options["bootstrap_room"] == meeting["bootstrap_room"]
    assert request.sampling["max_new_tokens"] == 1
    assert "min_new_tokens" not in request.sampling

    given = {"bootstrap_info": {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7}}
    request = translated()
    role.prepare(given, request)
    assert request.meeting == given["bootstrap_info"]


@pytest.mark.parametrize("key", ["bootstrap_info", "prefill_result"])
def test_a_decode_worker_goes_there(key: str) -> None:
    role = Role("decode", ("10.0.0.2", 9001))
    meeting = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 9000, "bootstrap_room": 0}
    request = translated()
    body = {key: meeting if key == "bootstrap_info" else {"disaggregated_params": meeting}}
    role.prepare(body, request)
    assert request.options == meeting
    assert request.meeting is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[("bootstrap_host", wrong) for wrong in (3, ["h"], "h" * 257)],
        *[("bootstrap_port", wrong) for wrong in ("9000", -1, 65_536, True)],
        *[("bootstrap_room", wrong) for wrong in ("7", -1, 2**63, 1.5, True)],
    ],
)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_place_to_meet_that_is_none_never_reaches_a_scheduler(mode: str, name: str, wrong: Any) -> None:
    given = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 2**63 - 1}
    Role(mode, ("h", 1)).prepare({"bootstrap_info": given}, translated())
    with pytest.raises(InvalidRequestError, match=name):
        Role(mode, ("h", 1)).prepare({"bootstrap_info": {**given, name: wrong}}, translated())


@pytest.mark.parametrize(
    ("mode", "request_", "message"),
    [
        ("decode", {}, "bootstrap_info.*bootstrap_host, bootstrap_port, bootstrap_room"),
        ("decode", {"annotations": ["x-bypass-remote-prefill"]}, "cannot prefill"),
        ("prefill", {"sampling_options": {"n": 2}}, "n: .*one answer"),
    ],
)
def test_what_cannot_be_divided(mode: str, request_: dict[str, Any], message: str) -> None:
    request = translated(sampling_options=request_.get("sampling_options"))
    with pytest.raises(InvalidRequestError, match=message):
        Role(mode, ("h", 1)).prepare(request_, request)


def test_the_scheduler_of_a_decode_worker_knows_what_was_cached_on_the_other() -> None:
    """The router does not, as a rule: it sends the request on before the prefill worker has counted."""
    chunks: list[Any] = []
    role = Role("decode", ("10.0.0.2", 9001))
    send = role.with_prefill_usage({"prefill_result": {"disaggregated_params": {"bootstrap_room": 1}}}, chunks.append)
    chunk: Any = {"token_ids": [1], "index": 0, "completion_usage": {"prompt_tokens_details": {"cached_tokens": 4}}}
    send(chunk)
    assert chunks[0]["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_a_canary_needs_no_decode_worker() -> None:
    """Nothing is announced for one: a router would send it on."""
    role = Role("prefill", ("10.0.0.1", 9000))
    request = translated()
    role.prepare({**canary_request(None, None), "bootstrap_info": role.canary()}, request)
    assert request.meeting is None
    assert request.options["bootstrap_room"] == 0


def test_an_undivided_request_stays_as_it_is() -> None:
    role = Role("null", ("h", 1))
    request = translated()
    role.prepare({}, request)
    assert request == translated()
    assert role.canary() is None
