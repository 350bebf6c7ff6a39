"""What the planner learns from the statistics of TensorRT-LLM's iterations."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_worker_trtllm import forward_passes
from dynamo_worker_trtllm.forward_passes import ForwardPasses

NUMBERS = {
    "numContextRequests": 1,
    "numCtxTokens": 2,
    "numCtxKvTokens": 3,
    "numGenRequests": 4,
    "numGenKvTokens": 5,
    "numQueuedContextRequests": 6,
    "numQueuedCtxTokens": 7,
    "numQueuedGenRequests": 8,
    "numQueuedGenKvTokens": 9,
    "numPausedRequests": 10,
    "numPausedKvTokens": 20,
}


class Publisher:
    """Takes the place of the runtime's publisher."""

    def __init__(self, endpoint: Any, worker_id: str, dp_size: int) -> None:
        self.made_for = (endpoint, worker_id, dp_size)
        self.published: list[Any] = []
        self.ended = False

    def publish(self, **numbers: Any) -> None:
        self.published.append(numbers)

    def shutdown(self) -> None:
        self.ended = True


@pytest.fixture
def publishers(monkeypatch: pytest.MonkeyPatch) -> list[Publisher]:
    made: list[Publisher] = []

    def make(*arguments: Any) -> Publisher:
        made.append(Publisher(*arguments))
        return made[-1]

    monkeypatch.setattr(forward_passes, "FpmDirectPublisher", make)
    return made


@pytest.fixture
def passes(publishers: list[Publisher]) -> ForwardPasses:
    passes = ForwardPasses()
    endpoint: Any = "endpoint"
    passes.attach(endpoint, 123, 2)
    return passes


def test_every_number_has_its_place(passes: ForwardPasses, publishers: list[Publisher]) -> None:
    passes.publish({"inflightBatchingStats": NUMBERS, "iterLatencyMS": 25.0, "attentionDpRank": 1})
    passes.publish({"inflightBatchingStats": NUMBERS, "iterLatencyMS": None})
    (publisher,) = publishers
    assert publisher.made_for == ("endpoint", "123", 2)
    first, second = publisher.published
    assert first == {
        "dp_rank": 1,
        "wall_time_secs": 0.025,
        "scheduled_num_prefill_requests": 1,
        "scheduled_sum_prefill_tokens": 2,
        "scheduled_sum_prefill_kv_tokens": 3,
        "scheduled_num_decode_requests": 4,
        "scheduled_sum_decode_kv_tokens": 5,
        "queued_num_prefill_requests": 6,
        "queued_sum_prefill_tokens": 7,
        "queued_num_decode_requests": 18,
        "queued_sum_decode_kv_tokens": 29,
    }
    assert (second["dp_rank"], second["wall_time_secs"]) == (0, 0.0)


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_an_engine_that_does_not_say_all_says_nothing(
    passes: ForwardPasses, publishers: list[Publisher], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Zeros would tell the planner that it is idle."""
    numbers = {each: 1 for each in NUMBERS if each != name}
    for _ in range(2):
        passes.publish({"inflightBatchingStats": numbers})
    assert publishers[0].ended
    assert not publishers[0].published
    assert caplog.text.count("does not report all of them") == 1
    assert name in str(vars(caplog.records[0]))


def test_statistics_before_the_planner_is_there(publishers: list[Publisher]) -> None:
    passes = ForwardPasses()
    passes.publish({"inflightBatchingStats": NUMBERS})
    passes.stop()
    assert not publishers


def test_a_rank_that_does_not_exist(passes: ForwardPasses, publishers: list[Publisher]) -> None:
    passes.publish({"inflightBatchingStats": NUMBERS, "attentionDpRank": 2})
    assert not publishers[0].published
    passes.stop()
    passes.stop()
    assert publishers[0].ended
