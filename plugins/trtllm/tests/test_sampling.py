"""The translation table: every field of a Dynamo request is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tensorrt_llm.executor.request import DEFAULT_REQUEST_PRIORITY
from tensorrt_llm.sampling_params import SamplingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.testing.translation import Translation
from dynamo_worker_trtllm import sampling
from dynamo_worker_trtllm.sampling import SamplingTable

VOCABULARY = 500


def table(
    defaults: Mapping[str, Any],
    *,
    end_ids: tuple[int, ...] = (2,),
    guides: str | None = "xgrammar",
    attention_dp: bool = False,
    sessions: bool = False,
    vocabulary: int = VOCABULARY,
) -> SamplingTable:
    model: Any = SimpleNamespace(
        sampling=dict(defaults), context_length=Translation.CONTEXT_LENGTH, vocab_size=vocabulary, end_ids=end_ids
    )
    affinity = SimpleNamespace(kv_cache_routing_conversation_affinity=True) if sessions else None
    args: Any = SimpleNamespace(
        guided_decoding_backend=guides, enable_attention_dp=attention_dp, attention_dp_config=affinity
    )
    return SamplingTable(model, args)


@pytest.mark.usefixtures("several_greedy_answers")
class TestTranslation(Translation):
    TABLE: ClassVar = sampling.TABLE
    PASSED_ON: ClassVar = {
        field: entry
        for field, entry in Translation.PASSED_ON.items()
        if field != ("stop_conditions", "max_thinking_tokens")
    } | {("stop_conditions", "ignore_eos"): (True, "end_id", -1)}
    REFUSED: ClassVar = {**Translation.REFUSED, ("stop_conditions", "max_thinking_tokens"): (11, None)}
    GUIDES: ClassVar = {
        "json": ({"type": "object"}, {"json": '{"type": "object"}'}),
        "regex": ("a+", {"regex": "a+"}),
        "choice": (["yes", "n.o"], {"regex": r"(yes|n\.o)"}),
        "grammar": ('root ::= "a"', {"grammar": 'root ::= "a"'}),
        "structural_tag": ({"type": "structural_tag"}, {"structural_tag": '{"type": "structural_tag"}'}),
    }
    WRONG_GUIDES: ClassVar = {**Translation.WRONG_GUIDES, "white space": {"json": {}, "whitespace_pattern": " "}}

    def translate(self, request: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
        return table(defaults).translate(request)

    def value_of(self, translated: Any, name: str) -> Any:
        value = getattr(translated.params, name)
        if name == "guided_decoding":
            kinds = ("json", "regex", "grammar", "structural_tag")
            return {kind: getattr(value, kind) for kind in kinds if getattr(value, kind) is not None}
        return sorted(value) if isinstance(value, list) else value

    def check(self, translated: Any) -> None:
        params = translated.params
        params._validate()
        for name in ("max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs"):
            assert getattr(params, name) is None or 0 <= getattr(params, name) < 2**31
        assert params.seed is None or 0 <= params.seed < 2**63
        assert 0 <= translated.options["priority"] <= 1
        assert not params.detokenize


@pytest.fixture
def several_greedy_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "1")


def translated(request: dict[str, Any] | None = None, /, **options: Any) -> Any:
    result = table({}, **options).translate({"token_ids": [5, 6, 7], **(request or {})})
    assert result is not None
    return result


def test_parameters_are_new_for_each_request() -> None:
    """TensorRT-LLM changes them."""
    same = table({"temperature": 0.5})
    first, second = (same.translate({"token_ids": [5]}) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first == second
    assert first.params is not second.params
    assert first.params.stop_token_ids is None


def test_nothing_is_detokenized_or_taken_back() -> None:
    params = translated({"stop_conditions": {"stop_token_ids": [3]}}).params
    assert (params.detokenize, params.include_stop_str_in_output) == (False, True)


def test_all_of_the_models_end_tokens_end_an_answer() -> None:
    """TensorRT-LLM has one of its own, and reads none from the model if it is given one."""
    params = translated({"stop_conditions": {"stop_token_ids": [3]}}, end_ids=(2, 8, 9)).params
    assert (params.end_id, params.pad_id, params.stop_token_ids) == (2, 2, [8, 9, 3])
    assert translated(end_ids=()).params.end_id == -1


def test_stop_tokens_stop_an_answer_that_no_end_token_ends() -> None:
    """TensorRT-LLM's own `ignore_eos` would drop them."""
    params = translated({"stop_conditions": {"ignore_eos": True, "stop_token_ids": [3]}}, end_ids=(2, 8)).params
    assert (params.end_id, params.pad_id, params.stop_token_ids, params.ignore_eos) == (-1, 2, [3], False)


def test_stop_tokens_that_there_are_not_are_left_out() -> None:
    stop = {"stop_token_ids": [3, VOCABULARY - 1, VOCABULARY, 2**40, -1]}
    assert translated({"stop_conditions": stop}).params.stop_token_ids == [3, VOCABULARY - 1]


def test_several_answers_need_sampling() -> None:
    with pytest.raises(InvalidRequestError, match=r"(?i)greedy"):
        translated({"sampling_options": {"n": 2}})
    assert translated({"sampling_options": {"n": 2, "top_p": 0.9}}).n == 2


@pytest.mark.parametrize(("given", "expected"), [(-1, 0), (0, 0), (7, 7)])
def test_top_k_of_all_tokens(given: int, expected: int) -> None:
    assert translated({"sampling_options": {"top_k": given}}).params.top_k == expected


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_seed_is_one_that_the_ranks_take(seed: int) -> None:
    assert translated({"sampling_options": {"seed": seed}}).params.seed == seed % 2**63


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", -0.1), ("top_p", 1.1), ("top_p", 0), ("min_p", 2), ("repetition_penalty", 0)],
        *[("top_k", -2), ("top_k", 2**31), ("temperature", 1e39), ("presence_penalty", -1e39), ("top_k", True)],
    ],
)
def test_numbers_that_the_ranks_would_fail_on(name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=rf"sampling_options\.{name}: expected"):
        translated({"sampling_options": {name: value}})


@pytest.mark.parametrize(("name", "value"), [("max_tokens", -1), ("min_tokens", 2**31), ("min_tokens", -1)])
def test_numbers_of_tokens_that_are_none(name: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"stop_conditions\.{name}: expected a number of tokens"):
        translated({"stop_conditions": {name: value}})


def test_logprobs_are_bounded_and_at_least_one() -> None:
    """TensorRT-LLM takes 0 for none; Dynamo takes it for those of the chosen tokens."""
    none = translated()
    assert (none.top, none.params.logprobs) == (None, None)
    chosen = translated({"output_options": {"logprobs": 0, "prompt_logprobs": 0}})
    assert (chosen.top, chosen.prompt_top, chosen.params.logprobs, chosen.params.prompt_logprobs) == (0, 0, 1, 1)
    for too_many in (-1, 2**32 - 1, 129):
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(InvalidRequestError, match=rf"output_options\.{name}: "):
                translated({"output_options": {name: too_many}})
    small = translated({"output_options": {"logprobs": -1}}, vocabulary=20)
    assert (small.top, small.params.logprobs) == (-1, 20)


def test_constraints_need_a_backend() -> None:
    regex = {"sampling_options": {"guided_decoding": {"regex": "a"}}}
    tag = {"sampling_options": {"guided_decoding": {"structural_tag": {"type": "structural_tag"}}}}
    with pytest.raises(InvalidRequestError, match=r"guided_decoding .*--guided-decoding-backend"):
        translated(regex, guides=None)
    assert translated(regex, guides="llguidance").params.guided_decoding.regex == "a"
    with pytest.raises(InvalidRequestError, match=r"structural_tag .*--guided-decoding-backend xgrammar"):
        translated(tag, guides="llguidance")


@pytest.mark.parametrize("name", ["logit_bias", "bad_token_ids", "embedding_bias", "no_repeat_ngram_size"])
def test_what_dynamo_has_no_field_for_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"extra_args\.sampling_options\.{name} is not supported"):
        translated({"extra_args": {"sampling_options": {name: {"7": 1}}}})
    with pytest.raises(InvalidRequestError, match="kv_hint is not supported"):
        translated({"kv_hint": {"actions": []}})


def test_priorities_keep_their_order() -> None:
    given = [-(2**63), -1000, -1, 0, 1, 2, 1000, 2**63 - 1]
    found = [translated({"routing": {"priority": priority}}).options["priority"] for priority in given]
    assert found == sorted(set(found))
    assert (found[3], min(found) >= 0, max(found) <= 1) == (0.5, True, True)
    assert translated().options["priority"] == DEFAULT_REQUEST_PRIORITY


def test_salts_keep_tenants_apart() -> None:
    assert translated({"routing": {"cache_salt": "a"}}).options["cache_salt"].endswith("a")
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        translated({"routing": {"cache_salt": "a" * 2000}})


def test_the_routers_rank_is_strict() -> None:
    request = {"routing": {"dp_rank": 1}}
    assert translated(request).options == translated().options  # one rank only
    chosen = translated(request, attention_dp=True).options["scheduling_params"]
    assert (chosen.attention_dp_rank, chosen.attention_dp_relax) == (1, False)
    with pytest.raises(InvalidRequestError, match=r"routing\.dp_rank"):
        translated({"routing": {"dp_rank": -1}})


def test_an_engine_that_keeps_sessions_together_chooses_the_rank_itself() -> None:
    request = {"routing": {"dp_rank": 1}, "agent_context": {"session_id": "s"}}
    options = translated(request, attention_dp=True, sessions=True).options
    assert options["conversation_params"].conversation_id == "s"
    assert "scheduling_params" not in options
    assert "conversation_params" not in translated(request, attention_dp=True).options


def test_a_canary_is_translated() -> None:
    request = canary_request(None, SimpleNamespace(vocab_size=VOCABULARY, bos_token_id=1))
    result = table({}).translate(request)
    assert result is not None
    assert isinstance(result.params, SamplingParams)
    assert result.params.max_tokens == 1
