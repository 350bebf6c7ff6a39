"""What becomes of SGLang's outputs: chunks in order, errors for the request they belong to, an end in every case."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.llm.exceptions import Disconnected
from sglang.srt.managers.io_struct import BatchEmbeddingOutput

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.kit.chunks import LEAST_LOGPROB
from dynamo_worker_sglang.manager import GenerateRequest, Manager
from dynamo_worker_sglang.outputs import Answer, Vector

LENGTH = {"type": "length", "length": 2}


def answered(*outputs: Any, **options: Any) -> list[Any]:
    """Return the chunks of an answer to which these are added, tokens and reason, or raise its error."""

    async def run() -> list[Any]:
        chunks: list[Any] = []
        answer = Answer(chunks.append, prompt_tokens=3, **options)
        for tokens, reason, *rest in outputs:
            answer.add(tokens, reason, 2, *rest)
        await asyncio.wait_for(answer.wait(), 1)
        return chunks

    return asyncio.run(run())


def test_tokens_and_the_end() -> None:
    first, last = answered(([5], None), ([6, 7], LENGTH), index=4)
    assert first == {"token_ids": [5], "index": 4}
    assert last["finish_reason"] == "length"
    assert last["completion_usage"]["completion_tokens"] == 3
    assert last["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize(("wanted", "reason"), [({7}, 7), (set(), None)])
def test_only_a_stop_token_of_the_client_is_named(wanted: set[int], reason: int | None) -> None:
    (chunk,) = answered(([7], {"type": "stop", "matched": 7}), stop_tokens=wanted)
    assert chunk["finish_reason"] == "stop"
    assert chunk.get("stop_reason") == reason


def test_nothing_comes_after_the_end() -> None:
    assert len(answered(([5], LENGTH), ([6], None))) == 1


@pytest.mark.parametrize(("status", "error"), [(400, InvalidRequestError), (500, Disconnected), (503, Disconnected)])
def test_what_sglang_refuses(status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="too bad"):
        answered(([], {"type": "abort", "message": "too bad", "status_code": status}))


def test_what_was_cancelled() -> None:
    (chunk,) = answered(([5], {"type": "abort", "message": "", "status_code": None}))
    assert (chunk["finish_reason"], chunk["token_ids"]) == ("cancelled", [])


def test_logprobs_are_json() -> None:
    meta = {
        "output_token_logprobs": [(-math.inf, 9, None)],
        "output_top_logprobs": [[(-0.5, 4, None), (-0.7, 5, None)]],
        "input_token_logprobs": [(None, 1, None), (-2.0, 2, None)],
        "input_top_logprobs": [None, [(-1.0, 3, None), (-1.5, 8, None)]],
    }
    (chunk,) = answered(([9], LENGTH, meta), top=1, prompt_top=1, decode=lambda token: f"t{token}")
    assert chunk["log_probs"] == [LEAST_LOGPROB]
    assert [(entry["token_id"], entry["rank"]) for entry in chunk["top_logprobs"][0]] == [(4, 1)]
    assert chunk["engine_data"]["prompt_logprobs"] == [
        None,
        {
            "3": {"logprob": -1.0, "rank": 1, "decoded_token": "t3"},
            "2": {"logprob": -2.0, "decoded_token": "t2"},
        },
    ]
    json.dumps(chunk, allow_nan=False)


def test_logprobs_that_do_not_match_are_left_out() -> None:
    (chunk,) = answered(([9, 8], LENGTH, {"output_token_logprobs": [(-1.0, 9, None)]}), top=0)
    assert "log_probs" not in chunk


def test_a_client_that_is_gone_ends_its_own_request() -> None:
    async def run() -> None:
        def send(_: Any) -> None:
            raise RuntimeError("closed")

        answer = Answer(send, prompt_tokens=1)
        answer.add([5], None, None)
        with pytest.raises(RuntimeError, match="closed"):
            await answer.wait()

    asyncio.run(run())


class Harness:
    """A manager with a few requests, without the processes that it needs otherwise."""

    def __init__(self) -> None:
        self.manager = Manager.__new__(Manager)
        self.manager.rid_to_state = {}
        self.manager.enable_lora = False
        self.manager.failure = None
        self.manager._is_pause = False
        self.chunks: dict[str, list[Any]] = {}

    def request(self, rid: str, **options: Any) -> Answer:
        self.chunks[rid] = []
        answer = Answer(self.chunks[rid].append, prompt_tokens=1, **options)
        state = SimpleNamespace(obj=GenerateRequest(rid=rid, answer=answer), finished=False, out_list=[], event=None)
        self.manager.rid_to_state[rid] = state
        answer.follow(state)
        return answer


def batch(**requests: tuple[list[int], Any]) -> Any:
    return SimpleNamespace(
        rids=list(requests),
        output_ids=[tokens for tokens, _ in requests.values()],
        finished_reasons=[reason for _, reason in requests.values()],
        cached_tokens=[0] * len(requests),
    )


@pytest.mark.parametrize(
    ("error", "submitted", "expected"),
    [
        (ValueError("the input is too long"), False, InvalidRequestError),
        (TypeError("not enough arguments"), False, TypeError),
        (ValueError("not enough values to unpack"), True, ValueError),
    ],
)
def test_only_what_is_refused_before_it_is_submitted_is_the_clients_fault(
    error: Exception, submitted: bool, expected: type[Exception]
) -> None:
    async def run() -> None:
        harness = Harness()
        answer = harness.request("a")

        async def generate_request(request: Any) -> Any:
            if not submitted:
                raise error
            answers = harness.manager._wait_one_response(request)
            answer.fail(error)
            async for output in answers:
                yield output

        harness.manager.generate_request = generate_request
        with pytest.raises(expected, match=str(error)) as raised:
            await harness.manager.run(GenerateRequest(rid="a", answer=answer))
        assert type(raised.value) is expected

    asyncio.run(run())


def test_the_short_way() -> None:
    async def run() -> None:
        harness = Harness()
        ends = harness.request("a"), harness.request("b")
        assert harness.manager._hand_out(batch(a=([1], None), gone=([2], None), b=([3], LENGTH)))
        assert [chunk["token_ids"] for chunk in harness.chunks["a"]] == [[1]]
        assert harness.chunks["b"][0]["finish_reason"] == "length"
        assert list(harness.manager.rid_to_state) == ["a"]
        await ends[1].wait()

    asyncio.run(run())


def test_vectors_take_the_short_way() -> None:
    async def run() -> None:
        harness = Harness()
        vectors = {name: Vector() for name in ("a", "b", "c")}
        for name, vector in vectors.items():
            request = SimpleNamespace(answer=vector, lora_path=None)
            harness.manager.rid_to_state[name] = SimpleNamespace(obj=request, finished=False)
        refused = {"type": "abort", "status_code": 400, "message": "too long"}
        aborted = {"type": "abort", "message": "by an operator"}
        made = BatchEmbeddingOutput(
            rids=["a", "gone", "b", "c"],
            finished_reasons=[LENGTH, LENGTH, refused, aborted],
            embeddings=[[0.5, 1.5], [9.0], [], []],
            prompt_tokens=[7, 1, 1, 1],
            cached_tokens=[0, 0, 0, 0],
            placeholder_tokens_idx=None,
            placeholder_tokens_val=None,
        )
        assert harness.manager._hand_out(made)
        await vectors["a"].wait()
        assert (vectors["a"].numbers, vectors["a"].prompt_tokens) == ([0.5, 1.5], 7)
        with pytest.raises(InvalidRequestError, match="too long"):
            await vectors["b"].wait()
        with pytest.raises(Disconnected, match="by an operator"):
            await vectors["c"].wait()
        assert not harness.manager.rid_to_state

    asyncio.run(run())


def test_what_needs_more_than_tokens_takes_sglangs_own_way() -> None:
    async def run() -> None:
        harness = Harness()
        harness.request("a")
        harness.request("b", top=0)
        assert not harness.manager._hand_out(batch(a=([1], None), b=([3], None)))
        assert not harness.chunks["a"]
        # which ends with the outputs in the request's list, and its event set
        state = harness.manager.rid_to_state["a"]
        state.out_list.append({"output_ids": [1], "meta_info": {"finish_reason": None}})
        state.event.set()
        assert harness.chunks["a"] == [{"token_ids": [1], "index": 0}]
        assert state.out_list == []

    asyncio.run(run())


def test_all_requests_end_when_nothing_comes_any_more() -> None:
    async def run() -> None:
        harness = Harness()
        answer = harness.request("a")
        harness.manager.fail("a process has failed")
        with pytest.raises(EngineDeadError, match="a process has failed"):
            await answer.wait()

    asyncio.run(run())
