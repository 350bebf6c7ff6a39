"""The short way of outputs: what it puts into a reader's mailbox, and that nothing of vLLM's own books is left open."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from dynamo_worker.kit.chunks import LEAST_LOGPROB
from dynamo_worker_vllm.outputs import DeltaProcessor, OutputReader


class Harness:
    """An output processor with one request and its mailbox."""

    def __init__(self, **params: Any) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        self.processor.__class__ = DeltaProcessor
        self.queue = RequestOutputCollector(RequestOutputKind.DELTA, "a-1")
        sampling = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **params)
        request = EngineCoreRequest(
            request_id="a-1",
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id="a",
        )
        self.processor.add_request(request, None, None, 0, self.queue)

    def step(self, *tokens: int, reason: FinishReason | None = None) -> None:
        self.processor.process_outputs([EngineCoreOutput("a-1", list(tokens), finish_reason=reason)])


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_tokens_wait_for_a_late_reader(harness: Harness) -> None:
    harness.step(5)
    harness.step(6, 7)
    assert harness.queue.output == {"token_ids": [5, 6, 7], "index": 0}
    assert harness.queue.ready.is_set()


def test_the_end(harness: Harness) -> None:
    harness.step(5, reason=FinishReason.LENGTH)
    chunk: Any = harness.queue.output
    assert str(chunk["finish_reason"]) == "length"
    assert not harness.processor.request_states
    assert not harness.processor.external_req_ids


def test_connected_chunks_go_straight_to_the_client(harness: Harness) -> None:
    sent: list[Any] = []
    harness.step(5)
    harness.processor.connect(harness.queue, sent.append)
    harness.step(6)
    harness.step(7, 8)
    assert sent == [{"token_ids": tokens, "index": 0} for tokens in ([5], [6], [7, 8])]
    assert harness.queue.output is None
    harness.step(9, reason=FinishReason.STOP)
    last: Any = harness.queue.output
    assert last["token_ids"] == [9]
    assert last["completion_usage"]["completion_tokens"] == 5


def test_what_was_disconnected_is_sent_nothing(harness: Harness) -> None:
    sent: list[Any] = []
    disconnect = harness.processor.connect(harness.queue, sent.append)
    disconnect()
    harness.step(6)
    assert sent == []


def test_a_client_that_is_gone_harms_nobody_else(harness: Harness) -> None:
    def send(chunk: Any) -> None:
        raise RuntimeError("closed")

    harness.processor.connect(harness.queue, send)
    harness.step(5)
    assert isinstance(harness.queue.output, RuntimeError)
    assert harness.queue.ready.is_set()
    harness.step(6)


def test_a_request_that_has_ended_already_stays_in_its_mailbox(harness: Harness) -> None:
    harness.step(5, reason=FinishReason.LENGTH)
    assert harness.processor.connect(harness.queue, lambda _: pytest.fail("sent")) is None
    assert harness.queue.output is not None


def test_nothing_follows_an_error(harness: Harness) -> None:
    harness.queue.put(RuntimeError("dead"))
    harness.step(5)
    assert isinstance(harness.queue.output, RuntimeError)


def test_what_was_aborted_is_ignored(harness: Harness) -> None:
    harness.processor.abort_requests(["a"], internal=False)
    harness.queue.output = None
    harness.step(5)
    assert harness.queue.output is None


@pytest.mark.parametrize(
    "params", [{"logprobs": 1}, {"prompt_logprobs": 1}, {"extra_args": {"kv_transfer_params": {}}}]
)
def test_everything_else_takes_vllms_own_way(params: dict[str, Any]) -> None:
    harness = Harness(**params)
    harness.step(5)
    assert isinstance(harness.queue.output, RequestOutput)


def output(logprobs: Any, tokens: list[int]) -> RequestOutput:
    completion = CompletionOutput(0, "", tokens, -1.5, logprobs, finish_reason="stop")
    prompt = [None, {7: Logprob(-math.inf, 4, None)}]
    return RequestOutput("a", None, [1, 2], prompt, [completion], True, num_cached_tokens=0)


def test_logprobs_are_json() -> None:
    position = {9: Logprob(-math.inf, 30, None), 4: Logprob(-0.5, 1, None)}
    (chunk,) = OutputReader(2, 1, lambda token: f"t{token}").read(output([position], [9]))
    assert chunk["log_probs"] == [LEAST_LOGPROB]
    assert [entry["token_id"] for entry in chunk["top_logprobs"][0]] == [4]
    assert chunk["engine_data"]["prompt_logprobs"] == [
        None,
        {"7": {"logprob": LEAST_LOGPROB, "rank": 4, "decoded_token": "t7"}},
    ]
    json.dumps(chunk, allow_nan=False)


def test_logprobs_that_do_not_match_are_left_out() -> None:
    (chunk,) = OutputReader(2, 1).read(output([{4: Logprob(-0.5, 1, None)}], [9]))
    assert "log_probs" not in chunk
