"""What becomes of TensorRT-LLM's results: chunks in order, errors for the request they belong to, an end always."""

from __future__ import annotations

import asyncio
import collections
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.llm.exceptions import Disconnected
from tensorrt_llm.executor.result import Logprob
from tensorrt_llm.executor.utils import EngineDeadError as TrtllmDeadError
from tensorrt_llm.executor.utils import ErrorResponse, RequestError

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.kit.chunks import LEAST_LOGPROB
from dynamo_worker_trtllm.outputs import Answers, translated


class Queue:
    """The part of TensorRT-LLM's queue that is used."""

    def __init__(self) -> None:
        self._q: collections.deque[Any] = collections.deque()
        self._event: Any = asyncio.Event()

    def empty(self) -> bool:
        return not self._q

    def put(self, entry: Any) -> None:
        self._q.append(entry)
        self._event.set()


class Result:
    """A result as TensorRT-LLM has it: one object for all steps, whose lists grow in place."""

    def __init__(self, answers: int = 1) -> None:
        self.aqueue = Queue()
        self.finished = False
        self.cached_tokens = 2
        self.outputs = [
            SimpleNamespace(
                index=index,
                token_ids=[],
                logprobs=[],
                prompt_logprobs=[],
                finish_reason=None,
                stop_reason=None,
                disaggregated_params=None,
            )
            for index in range(answers)
        ]

    async def __anext__(self) -> Result:
        entry = self.aqueue._q.popleft()
        if isinstance(entry, Exception):
            raise entry
        index, tokens, reason, rest = entry
        output = self.outputs[index]
        output.token_ids.extend(tokens)
        output.finish_reason = reason
        for name, value in rest.items():
            if name == "take_back":
                del output.token_ids[-value:]
            else:
                setattr(output, name, value)
        self.finished = all(output.finish_reason for output in self.outputs)
        if not self.aqueue._q:
            self.aqueue._event.clear()
        return self


def step(*tokens: int, index: int = 0, reason: str | None = None, **rest: Any) -> Any:
    return index, list(tokens), reason, rest


def answered(*steps: Any, before: int = 0, answers: int = 1, send: Any = None, **options: Any) -> list[Any]:
    """Return the chunks for these steps, or raise the answer's error; `before` arrive before anybody listens."""

    async def run() -> list[Any]:
        chunks: list[Any] = []
        result = Result(answers)
        answer = Answers(send or chunks.append, prompt_tokens=3, **options)
        for entry in steps[:before]:
            result.aqueue.put(entry)
        answer.follow(result)
        for entry in steps[before:]:
            result.aqueue.put(entry)
        assert answer.finished.is_set()
        assert answer.begun.is_set()
        await asyncio.wait_for(answer.wait(), 1)
        return chunks

    return asyncio.run(run())


@pytest.mark.parametrize("before", [0, 1, 3])
def test_deltas_of_a_list_that_grows(before: int) -> None:
    first, second, last = answered(step(5), step(6, 7), step(8, reason="length"), before=before)
    assert first == {"token_ids": [5], "index": 0}
    assert second == {"token_ids": [6, 7], "index": 0}
    assert (last["token_ids"], last["finish_reason"]) == ([8], "length")
    usage = last["completion_usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 4)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_answers_come_in_any_order_and_end_one_by_one() -> None:
    chunks = answered(
        step(5, index=1), step(6), step(7, index=1, reason="stop", stop_reason=7), step(8, reason="length"), answers=2
    )
    assert [(chunk["index"], chunk["token_ids"], chunk.get("finish_reason")) for chunk in chunks] == [
        (1, [5], None),
        (0, [6], None),
        (1, [7], "stop"),
        (0, [8], "length"),
    ]
    assert chunks[2]["stop_reason"] == 7


def test_tokens_that_the_last_step_takes_back() -> None:
    first, last = answered(step(5, 6), step(reason="stop", take_back=1))
    assert first["token_ids"] == [5, 6]
    assert (last["token_ids"], last["completion_usage"]["completion_tokens"]) == ([], 2)


def test_what_was_cancelled() -> None:
    chunk = answered(step(5), step(6, reason="cancelled"))[-1]
    assert (chunk["finish_reason"], chunk["token_ids"]) == ("cancelled", [])


def test_a_request_that_took_too_long_may_migrate() -> None:
    with pytest.raises(Disconnected, match="timeout"):
        answered(step(5, reason="timeout"))


def test_a_prefill_is_handed_over() -> None:
    (chunk,) = answered(
        step(5, reason="not_finished", disaggregated_params="secret state"), hand_over=lambda params: {"state": params}
    )
    assert chunk["finish_reason"] == "stop"
    assert chunk["disaggregated_params"] == {"state": "secret state"}


def test_logprobs_are_json() -> None:
    position = {9: Logprob(-math.inf, 40), 4: Logprob(-0.5, 1), 5: Logprob(-0.7, 2)}
    prompt = [None, {3: Logprob(-1.0, 1)}]
    (chunk,) = answered(
        step(9, reason="length", logprobs=[position], prompt_logprobs=prompt),
        top=2, prompt_top=1, decode=lambda token: f"t{token}",
    )  # fmt: skip
    assert chunk["log_probs"] == [LEAST_LOGPROB]
    assert [(entry["token_id"], entry["rank"]) for entry in chunk["top_logprobs"][0]] == [(4, 1), (5, 2)]
    assert chunk["engine_data"]["prompt_logprobs"] == [
        None,
        {"3": {"logprob": -1.0, "rank": 1, "decoded_token": "t3"}},
    ]
    json.dumps(chunk)


@pytest.mark.parametrize("logprobs", [[], [-0.5], [{4: Logprob(-0.5, 1)}]], ids=["none", "numbers", "other token"])
def test_logprobs_that_do_not_match_the_tokens_are_left_out(logprobs: list[Any]) -> None:
    (chunk,) = answered(step(9, reason="length", logprobs=logprobs), top=1)
    assert "log_probs" not in chunk
    assert chunk["token_ids"] == [9]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("the prompt exceeds max_num_tokens"), InvalidRequestError),
        (RequestError("no KV cache blocks could be transferred"), Disconnected),
        (RequestError("CUDA error: an illegal memory access was encountered"), EngineDeadError),
        (ErrorResponse(1, "beam_width must be 1", 1), InvalidRequestError),
        (ErrorResponse(1, "NCCL error in: all_reduce", 1), EngineDeadError),
        (TrtllmDeadError(RuntimeError("rank 1 (pid 5) exited unexpectedly")), EngineDeadError),
        (RuntimeError("LLM is shutting down"), Disconnected),
        (KeyError("a bug"), Disconnected),
    ],
)
def test_what_an_error_in_the_queue_means(error: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        answered(step(5), error)


def test_an_executor_is_never_shut_down_on_the_event_loop() -> None:
    """TensorRT-LLM's own reading of an error does that if the error is fatal, and waits for dead ranks."""

    class Waits(Result):
        async def __anext__(self) -> Result:
            raise AssertionError("TensorRT-LLM has read the error")

    async def run() -> None:
        result = Waits()
        answer = Answers(lambda _: None, prompt_tokens=1)
        answer.follow(result)
        result.aqueue.put(TrtllmDeadError(RuntimeError("gone")))
        with pytest.raises(EngineDeadError, match="gone"):
            await answer.wait()

    asyncio.run(run())


def test_a_client_who_is_gone_ends_only_the_answer() -> None:
    """The engine's last word is still heard: an abort waits for it."""

    def gone(_: Any) -> None:
        raise RuntimeError("the client is gone")

    with pytest.raises(RuntimeError, match="the client is gone"):
        answered(step(5), step(6), step(7, reason="cancelled"), send=gone)


def test_every_step_is_counted_whether_anybody_listens_or_not() -> None:
    steps: list[bool] = []
    answered(step(5), step(6, reason="length"), on_step=lambda result: steps.append(result.finished))
    assert steps == [False, True]


def test_errors_of_the_worker_stay_as_they_are() -> None:
    for error in (EngineDeadError("x"), InvalidRequestError("x"), Disconnected("x")):
        assert translated(error) is error
