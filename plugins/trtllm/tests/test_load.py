"""Statistics and KV events: what routers and operators learn."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker.kit import kv_events
from dynamo_worker_trtllm.load import kv_events as events_of
from dynamo_worker_trtllm.load import read_load


class Llm:
    """What is asked of TensorRT-LLM."""

    def __init__(self, *news: Any) -> None:
        self.news = list(news)
        self.args: Any = None

    def get_stats(self, timeout: float) -> Any:
        assert timeout < 0.1
        return self.news.pop(0) if self.news else []

    get_kv_cache_events = get_stats


class Publisher:
    """Takes what is published."""

    def __init__(self, **options: Any) -> None:
        self.rank = options.get("dp_rank")
        self.published: list[Any] = []

    def publish(self, rank: int, blocks: int) -> None:
        self.published.append((rank, blocks))

    def publish_batch(self, events: list[Any]) -> None:
        self.published += events


def stat(active: int, blocks: int, rank: int | None = None) -> dict[str, Any]:
    return {
        "numActiveRequests": active,
        "numQueuedRequests": 1,
        "kvCacheStats": {"usedNumBlocks": blocks},
        **({} if rank is None else {"attentionDpRank": rank}),
    }


def test_load() -> None:
    async def check() -> None:
        publisher: Any = Publisher()
        seen: list[Any] = []

        class Metrics:
            log_iteration_stats = seen.append

        news = ([json.dumps(stat(2, 5))], [], [stat(0, 3, rank=1), stat(1, 4, rank=0)])
        passes: Any = SimpleNamespace(publish=seen.append)
        reader = read_load(Llm(*news), publisher, Metrics, passes)  # type: ignore[arg-type]
        while reader.steps < 3:
            await asyncio.sleep(0.01)
        assert publisher.published == [(0, 5), (1, 3), (0, 4)]
        assert reader.requests() == 3
        assert len(seen) == 6
        reader.stop()

    asyncio.run(asyncio.wait_for(check(), 10))


def forwarded(monkeypatch: pytest.MonkeyPatch, *events: Any, ranks: int = 1) -> dict[int, list[Any]]:
    """Return what each rank's publisher gets of these events."""
    publishers: dict[int, Publisher] = {}

    def make(**options: Any) -> Publisher:
        publishers[options["dp_rank"]] = Publisher(**options)
        return publishers[options["dp_rank"]]

    monkeypatch.setattr(kv_events, "KvEventPublisher", make)

    async def run() -> None:
        llm = Llm(events)
        llm.args = SimpleNamespace(
            kv_cache_config=SimpleNamespace(event_buffer_max_size=9, enable_block_reuse=True, tokens_per_block=2)
        )
        source = events_of(llm, range(ranks))
        assert source is not None
        forwarder = source.forward(None)  # type: ignore[arg-type]
        while llm.news:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        forwarder.stop()

    asyncio.run(run())
    return {rank: publisher.published for rank, publisher in publishers.items()}


def event(number: int, data: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"event_id": number, "data": data, **rest}


def stored(*blocks: tuple[int, list[int]], parent: int | None = None, **rest: Any) -> dict[str, Any]:
    return {
        "type": "stored",
        "parent_hash": parent,
        "blocks": [{"block_hash": key, "tokens": [{"token_id": token} for token in tokens]} for key, tokens in blocks],
        **rest,
    }


def test_blocks_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    found = forwarded(
        monkeypatch,
        event(0, {"type": "created"}),
        json.dumps(event(1, stored((2**64 - 1, [1, 2]), (7, [3, 4]), parent=2**63))),
        event(2, {"type": "removed", "block_hashes": [2**64 - 1]}),
        event(3, {"type": "updated"}),
    )[0]
    assert [each["type"] for each in found] == ["stored", "removed"]
    assert found[0]["token_ids"] == [1, 2, 3, 4]
    assert (found[0]["block_hashes"], found[0]["parent_hash"]) == ([-1, 7], -(2**63))
    assert found[0]["num_block_tokens"] == [2, 2]
    assert found[1]["block_hashes"] == [-1]


def test_blocks_that_are_not_full_are_kept_to_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    found = forwarded(
        monkeypatch,
        event(1, stored((5, [1, 2]), (6, [3]))),
        event(2, stored((8, [9]))),
        event(3, {"type": "removed", "block_hashes": [6, 5]}),
        event(4, {"type": "removed", "block_hashes": [8]}),
    )[0]
    assert [each.get("block_hashes") for each in found] == [[5], [5]]


def test_only_global_attention_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = forwarded(
        monkeypatch,
        event(0, {"type": "created"}, window_size=128),
        event(1, {"type": "created"}, window_size=4096),
        event(2, stored((5, [1, 2])), window_size=128),
        event(3, stored((6, [1, 2])), window_size=4096),
    )[0]
    assert [each["block_hashes"] for each in found] == [[6]]


def test_each_attention_rank_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = forwarded(
        monkeypatch,
        event(1, stored((5, [1, 2])), attention_dp_rank=1),
        event(1, stored((6, [1, 2])), attention_dp_rank=0),
        event(2, stored((7, [1, 2])), attention_dp_rank=5),
        ranks=2,
    )
    assert [each["block_hashes"] for each in found[0]] == [[6]]
    assert [each["block_hashes"] for each in found[1]] == [[5]]


@pytest.mark.parametrize("salt", ["tenant", None])
def test_a_tenants_blocks_have_its_salt(monkeypatch: pytest.MonkeyPatch, salt: str | None) -> None:
    data = stored((5, [1, 2]), lora_name="adapter")
    if salt is not None:
        data["blocks"][0]["cache_salt"] = f"dynamo-cache-salt:{salt}"
    (found,) = forwarded(monkeypatch, event(1, data))[0]
    assert (found["cache_salt"], found["lora_name"]) == (salt, "adapter")


@pytest.mark.parametrize("missing", ["event_buffer_max_size", "enable_block_reuse"])
def test_ranks_without_a_buffer_or_reuse_report_nothing(missing: str) -> None:
    config = {"event_buffer_max_size": 9, "enable_block_reuse": True, "tokens_per_block": 2, missing: 0}
    llm = Llm()
    llm.args = SimpleNamespace(kv_cache_config=SimpleNamespace(**config))
    assert events_of(llm, range(1)) is None


def test_a_gap_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    forwarded(monkeypatch, event(1, stored((5, [1, 2]))), event(2, stored((6, [1, 2]))))
    assert "lost" not in caplog.text
    forwarded(monkeypatch, event(1, stored((5, [1, 2]))), event(3, stored((6, [1, 2]))))
    assert "KV events were lost" in caplog.text
