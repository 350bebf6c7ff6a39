"""The stand-in's API surface and the engine inside its ranks, without any process."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("tensorrt_llm")

from tensorrt_llm._torch.pyexecutor.guided import valid_text
from tensorrt_llm._torch.pyexecutor.llm_response import LlmResponse
from tensorrt_llm._torch.pyexecutor.py_executor import PyExecutor
from tensorrt_llm._torch.pyexecutor.tokens import made_up_answer
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.request import GenerationRequest, LoRARequest
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi import LLM, KvCacheConfig, PreprocessedInputs, SchedulerConfig, TorchLlmArgs
from tensorrt_llm.llmapi.disagg_utils import MIN_GLOBAL_ID, get_global_disagg_request_id
from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_options
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

PROMPT = [5, 6, 7, 8, 9, 10]
BLOCK = 4


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder without weights, and an engine that neither loads nor waits."""
    monkeypatch.setenv("TLLM_STANDIN_LOAD_SECONDS", "0")
    monkeypatch.setenv("TLLM_STANDIN_STEP_SECONDS", "0")
    config = {"vocab_size": 512, "eos_token_id": 2, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def engine(model: Path) -> Iterator[Callable[..., PyExecutor]]:
    """Make engines of one rank."""
    made: list[PyExecutor] = []

    def make(**kwargs: Any) -> PyExecutor:
        cache = {"tokens_per_block": BLOCK, "event_buffer_max_size": 100, **kwargs.pop("kv_cache_config", {})}
        args = TorchLlmArgs(model=str(model), kv_cache_config=cache, enable_iter_perf_stats=True, **kwargs)
        comm = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1)
        made.append(PyExecutor(args, comm))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()


_ids = iter(range(1, 10_000))


def request(prompt: list[int] | None = None, **kwargs: Any) -> GenerationRequest:
    own = {"lora_request", "streaming", "disaggregated_params", "scheduling_params", "priority"}
    others = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
    params = SamplingParams(**{"end_id": 2, "max_tokens": 8, **kwargs})
    return GenerationRequest(
        list(PROMPT if prompt is None else prompt), params, **{"streaming": True, **others}
    ).set_id(next(_ids))


def run(engine: PyExecutor, *requests: GenerationRequest) -> list[LlmResponse]:
    for each in requests:
        engine.enqueue(each)
    responses = []
    until = time.monotonic() + 10
    while not engine.idle():
        assert time.monotonic() < until
        responses += engine.step()
    return responses


def tokens(responses: list[LlmResponse], index: int = 0) -> list[int]:
    return [token for each in responses for delta in each.outputs if delta.index == index for token in delta.new_tokens]


class TestArguments:
    def test_extra_keys_are_refused_at_every_level(self) -> None:
        with pytest.raises(ValueError, match="nonsense"):
            TorchLlmArgs(model="m", nonsense=1)
        with pytest.raises(ValueError, match="nonsense"):
            TorchLlmArgs(model="m", kv_cache_config={"nonsense": 1})

    def test_none_means_the_default_but_for_max_seq_len(self) -> None:
        args = TorchLlmArgs(model="m", max_batch_size=None, max_num_tokens=None, max_beam_width=None, max_seq_len=None)
        assert args.get_runtime_sizes() == (1, 8192, None, 2048)

    def test_the_world_size_is_the_product(self) -> None:
        assert TorchLlmArgs(model="m", tensor_parallel_size=2, pipeline_parallel_size=3).world_size == 6

    def test_they_can_be_pickled(self) -> None:
        args = pickle.loads(pickle.dumps(TorchLlmArgs(model="m", scheduler_config=SchedulerConfig())))
        assert args.model == "m"

    def test_the_constructor_names_an_unknown_argument(self) -> None:
        with pytest.raises(ValueError, match="LLM got invalid argument: max_bach_size"):
            LLM("m", max_bach_size=1)

    def test_too_few_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TLLM_STANDIN_GPUS", "1")
        with pytest.raises(RuntimeError, match=r"Only 1 GPUs are available, but 2 are required\."):
            LLM("m", tensor_parallel_size=2, gpus_per_node=8)

    def test_a_yaml_file_goes_over_the_arguments(self, tmp_path: Path) -> None:
        path = tmp_path / "extra.yaml"
        path.write_text("max_batch_size: 4\nkv_cache_config: {max_tokens: 64}\n")
        merged = update_llm_args_with_extra_options(
            {"max_batch_size": 8, "kv_cache_config": KvCacheConfig(free_gpu_memory_fraction=0.5)}, str(path)
        )
        assert merged == {
            "max_batch_size": 4,
            "kv_cache_config": {"free_gpu_memory_fraction": 0.5, "max_tokens": 64},
        }

    def test_the_signature_of_generate_async(self) -> None:
        assert list(inspect.signature(LLM.generate_async).parameters)[1:] == [
            "inputs",
            "sampling_params",
            "lora_request",
            "prompt_adapter_request",
            "streaming",
            "kv_cache_retention_config",
            "disaggregated_params",
            "trace_headers",
            "_postproc_params",
            "scheduling_params",
            "conversation_params",
            "cache_salt",
            "priority",
        ]


class TestDataclasses:
    @pytest.mark.parametrize(
        "bad",
        [{"top_k": -1}, {"top_p": 1.5}, {"n": 2, "best_of": 1}, {"n": 2}, {"truncate_prompt_tokens": 0}],
    )
    def test_bad_sampling_parameters(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"expected|greedy"):
            SamplingParams(**bad)

    def test_more_than_one_guide(self) -> None:
        with pytest.raises(ValueError, match="at most one guide"):
            SamplingParams(guided_decoding=GuidedDecodingParams(regex="a", json_object=True))

    def test_they_can_be_copied_with_changes(self) -> None:
        assert dataclasses.replace(SamplingParams(n=2, temperature=0.5), max_tokens=3).max_tokens == 3
        given = DisaggregatedParams(request_type="CONTEXT_ONLY")
        assert dataclasses.asdict(given)["request_type"] == "context_only"
        with pytest.raises(ValueError, match="request_type"):
            DisaggregatedParams(request_type="decode")

    def test_global_ids_differ_and_lie_above_local_ones(self) -> None:
        found = {get_global_disagg_request_id(3, 1) for _ in range(100)}
        assert len(found) == 100
        assert min(found) >= MIN_GLOBAL_ID
        with pytest.raises(ValueError, match="node_id"):
            get_global_disagg_request_id(256)

    def test_preprocessed_inputs_need_only_ids(self) -> None:
        assert PreprocessedInputs([1]).query_token_ids is None


class TestTokens:
    def test_an_answer_is_a_function_of_the_request(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine()
        answer = tokens(run(one, request()))
        assert answer == made_up_answer(one.vocabulary, PROMPT, SamplingParams(end_id=2), 8)
        assert answer == tokens(run(one, request()))
        assert 2 not in answer
        assert max(answer) < 512

    def test_a_prompt_that_ends_in_a_part_of_the_answer_is_continued(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine()
        answer = tokens(run(one, request()))
        assert tokens(run(one, request(PROMPT + answer[:3], max_tokens=5))) == answer[3:]

    def test_seed_and_adapter_change_it(self, engine: Callable[..., PyExecutor], model: Path) -> None:
        (model / "adapter_config.json").write_text("{}")
        one = engine(enable_lora=True)
        answers = [
            tokens(run(one, request(**kwargs)))
            for kwargs in (
                {},
                {"temperature": 1.0, "seed": 1},
                {"temperature": 1.0, "seed": 2},
                {"lora_request": LoRARequest("a", 1, str(model))},
            )
        ]
        assert len({tuple(answer) for answer in answers}) == 4
        assert one.loras == {1: "a"}

    def test_eos_comes_where_it_is_asked_for(
        self, engine: Callable[..., PyExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TLLM_STANDIN_EOS_AFTER", "3")
        responses = run(engine(), request())
        assert len(tokens(responses)) == 4
        assert responses[-1].outputs[0].finish_reason == "end_id"

    def test_several_sequences_are_interleaved(self, engine: Callable[..., PyExecutor]) -> None:
        responses = run(engine(), request(n=2, temperature=1.0, max_tokens=3))
        assert [each.outputs[0].index for each in responses] == [0, 1, 0, 1, 0, 1]
        assert [each.final for each in responses] == [False] * 5 + [True]
        assert tokens(responses, 0) != tokens(responses, 1)

    def test_without_streaming_there_is_one_response(self, engine: Callable[..., PyExecutor]) -> None:
        responses = run(engine(), request(streaming=False))
        assert [len(each.outputs[0].new_tokens) for each in responses] == [8]

    def test_a_stop_id_ends_it_and_is_to_be_cut_off(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine()
        answer = tokens(run(one, request()))
        last = run(one, request(stop_token_ids=[answer[2]]))[-1].outputs[0]
        assert (last.finish_reason, last.stop_reason, last.trim) == ("stop_words", answer[2], 1)
        last = run(one, request(stop_token_ids=[answer[2]], include_stop_str_in_output=True))[-1].outputs[0]
        assert last.trim == 0

    def test_log_probabilities(self, engine: Callable[..., PyExecutor]) -> None:
        responses = run(engine(), request(logprobs=2, prompt_logprobs=1, max_tokens=2))
        first = responses[0].outputs[0]
        assert [len(entry) for entry in first.logprobs or []] == [2]
        assert (first.logprobs or [])[0][first.new_tokens[0]].rank == 1
        assert len(first.prompt_logprobs or []) == len(PROMPT)
        assert responses[1].outputs[0].prompt_logprobs is None

    @pytest.mark.parametrize(
        ("guide", "text"),
        [
            ({"json_object": True}, '{"answer": "made up"}'),
            ({"regex": "(yes|no)"}, "yes"),
            ({"regex": r"[0-9]{3}-\d"}, "000-1"),
            ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}, '{"a": 1}'),
            ({"json": '{"enum": ["x", "y"]}'}, '"x"'),
        ],
    )
    def test_guided_text(self, guide: dict[str, Any], text: str) -> None:
        assert valid_text(GuidedDecodingParams(**guide)) == text


class TestRefusals:
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"prompt": []}, "empty"),
            ({"prompt": [512]}, "vocabulary"),
            ({"prompt": [5] * 300}, "max_seq_len"),
            ({"guided_decoding": GuidedDecodingParams(json_object=True)}, "guided_decoding_backend"),
            ({"disaggregated_params": DisaggregatedParams(request_type="context_only")}, "cache_transceiver_config"),
        ],
    )
    def test_a_request_that_cannot_run(
        self, engine: Callable[..., PyExecutor], bad: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RequestError, match=message):
            engine().enqueue(request(bad.pop("prompt", None), **bad))

    def test_an_adapter_without_lora(self, engine: Callable[..., PyExecutor], tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="enable_lora"):
            engine().enqueue(request(lora_request=LoRARequest("a", 1, str(tmp_path))))


class TestScheduling:
    def test_at_most_max_batch_size_run(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine(max_batch_size=2)
        run(one, *(request() for _ in range(5)))
        stats = one.latest_stats()
        assert max(entry["numActiveRequests"] for entry in stats) == 2
        assert stats[0]["numQueuedRequests"] == 3
        assert stats[-1]["numActiveRequests"] == stats[-1]["kvCacheStats"]["usedNumBlocks"] == 0

    def test_a_full_cache_makes_requests_wait(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine(kv_cache_config={"max_tokens": 4 * BLOCK})
        responses = run(one, request([5] * 6), request([6] * 6))
        assert [each.final for each in responses].index(True) < next(
            at for at, each in enumerate(responses) if each.request_id == responses[-1].request_id
        )

    def test_a_cancelled_request_ends_with_the_next_iteration(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine(max_batch_size=1)
        running, queued = request(max_tokens=100), request()
        one.enqueue(running)
        one.enqueue(queued)
        one.step()
        one.cancel(running.id)
        one.cancel(queued.id)
        ended = {each.request_id: each.outputs[0].finish_reason for each in one.step() if each.final}
        assert ended == {running.id: "cancelled", queued.id: "cancelled"}
        assert one.idle()

    def test_attention_dp_ranks_have_caches_of_their_own(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine(tensor_parallel_size=2, enable_attention_dp=True)
        for rank in (1, 1):
            run(one, request(scheduling_params=SchedulingParams(attention_dp_rank=rank)))
        events = one.latest_kv_events()
        assert {event["attention_dp_rank"] for event in events if event["data"]["type"] == "stored"} == {1}
        assert [event["event_id"] for event in events if event["attention_dp_rank"] == 1] == [0, 1, 2]
        assert {entry["attentionDpRank"] for entry in one.latest_stats()} == {0, 1}


class TestBlocks:
    def test_a_prefix_is_reused_and_reported_once(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine()
        prompt = list(range(3, 3 + 2 * BLOCK))
        first = run(one, request(prompt, max_tokens=1))
        again = run(one, request([*prompt, 9], max_tokens=1))
        assert first[0].cached_tokens == 0
        assert again[0].cached_tokens == 2 * BLOCK
        stored = [event["data"] for event in one.latest_kv_events() if event["data"]["type"] == "stored"]
        assert len(stored) == 1
        assert [token["token_id"] for block in stored[0]["blocks"] for token in block["tokens"]] == prompt
        assert stored[0]["parent_hash"] is None
        assert one.latest_kv_events() == []

    def test_the_last_prompt_token_is_always_computed(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine()
        prompt = list(range(3, 3 + 2 * BLOCK))
        run(one, request(prompt, max_tokens=1))
        assert run(one, request(prompt, max_tokens=1))[0].cached_tokens == BLOCK

    def test_eviction_is_reported_with_hashes_that_were_stored(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine(kv_cache_config={"max_tokens": 4 * BLOCK})
        for start in (3, 30, 60, 90):
            run(one, request(list(range(start, start + 2 * BLOCK)), max_tokens=2))
        stored: set[int] = set()
        removed: list[int] = []
        events = one.latest_kv_events()
        for event in events:
            data = event["data"]
            if data["type"] == "stored":
                stored |= {block["block_hash"] for block in data["blocks"]}
            elif data["type"] == "removed":
                assert set(data["block_hashes"]) <= stored
                removed += data["block_hashes"]
        assert removed
        assert len(stored) - len(removed) <= 4
        assert [event["event_id"] for event in events] == list(range(len(events)))

    def test_without_reuse_there_are_no_events(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine(kv_cache_config={"enable_block_reuse": False})
        run(one, request(list(range(3, 20))))
        assert one.latest_kv_events() == []
        assert run(one, request(list(range(3, 20))))[0].cached_tokens == 0

    def test_reset_forgets_them(self, engine: Callable[..., PyExecutor]) -> None:
        one = engine()
        run(one, request(list(range(3, 20))))
        one.call("reset_prefix_cache")
        assert run(one, request(list(range(3, 20))))[0].cached_tokens == 0


class TestCalls:
    def test_sleep_needs_its_configuration(self, engine: Callable[..., PyExecutor]) -> None:
        with pytest.raises(ValueError, match="sleep_config"):
            engine().call("sleep", (["kv_cache"],))
        one = engine(sleep_config={})
        one.call("sleep", (["kv_cache"],))
        assert one.asleep == {"kv_cache"}
        one.call("wakeup", (["kv_cache"],))
        assert one.asleep == set()

    def test_an_unknown_method(self, engine: Callable[..., PyExecutor]) -> None:
        with pytest.raises(AttributeError, match="no method 'fly'"):
            engine().call("fly")

    def test_capacity(self, engine: Callable[..., PyExecutor]) -> None:
        capacity = engine(kv_cache_config={"max_tokens": 64}).kv_cache_capacity()
        assert capacity == {"maxNumBlocks": 16, "tokensPerBlock": BLOCK, "maxNumTokens": 64}


class TestDisaggregation:
    def prefill(self, engine: PyExecutor, **kwargs: Any) -> DisaggregatedParams:
        given = DisaggregatedParams(request_type="context_only", disagg_request_id=MIN_GLOBAL_ID)
        engine.enqueue(request(max_tokens=1, disaggregated_params=given, **kwargs))
        response = engine.step()[-1]
        assert response.outputs[0].finish_reason == "length"
        found = response.outputs[0].disaggregated_params
        assert found is not None
        return found

    def test_the_blocks_move_and_the_answer_goes_on(self, engine: Callable[..., PyExecutor]) -> None:
        context, generation = (engine(cache_transceiver_config={"backend": "DEFAULT"}) for _ in range(2))
        handed = self.prefill(context)
        assert not context.idle()
        assert context.latest_stats()[-1]["numActiveRequests"] == 1
        given = dataclasses.replace(handed, request_type="generation_only")
        answer = tokens(run(generation, request(disaggregated_params=given)))
        assert answer == made_up_answer(context.vocabulary, PROMPT, SamplingParams(end_id=2), 8)
        assert handed.first_gen_tokens == answer[:1]
        until = time.monotonic() + 5
        while not context.idle():
            context.step()
            assert time.monotonic() < until
        assert context.latest_stats()[-1]["numActiveRequests"] == 0

    def test_an_answer_that_ends_with_its_first_token_hands_nothing_over(
        self, engine: Callable[..., PyExecutor]
    ) -> None:
        context = engine(cache_transceiver_config={"backend": "DEFAULT"})
        first = made_up_answer(context.vocabulary, PROMPT, SamplingParams(end_id=2), 1)
        given = DisaggregatedParams(request_type="context_only")
        last = run(context, request(max_tokens=1, disaggregated_params=given, end_id=first[0]))[-1].outputs[0]
        assert last.finish_reason == "end_id"
        assert last.disaggregated_params is not None
        assert last.disaggregated_params.opaque_state is None

    def test_a_context_phase_may_end_as_not_finished(
        self, engine: Callable[..., PyExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TLLM_STANDIN_CONTEXT_FINISH", "not_finished")
        context = engine(cache_transceiver_config={"backend": "DEFAULT"})
        context.enqueue(request(disaggregated_params=DisaggregatedParams(request_type="context_only")))
        assert context.step()[-1].outputs[0].finish_reason == "not_finished"

    def test_unfetched_blocks_are_freed_after_the_timeout(self, engine: Callable[..., PyExecutor]) -> None:
        context = engine(cache_transceiver_config={"backend": "DEFAULT", "kv_transfer_timeout_ms": 50})
        generation = engine(cache_transceiver_config={"backend": "DEFAULT"})
        handed = self.prefill(context)
        time.sleep(0.1)
        context.step()
        assert context.idle()
        given = dataclasses.replace(handed, request_type="generation_only")
        responses = run(generation, request(disaggregated_params=given))
        assert "transfer failed" in str(responses[-1].error)
        assert generation.latest_stats()[-1]["kvCacheStats"]["usedNumBlocks"] == 0
