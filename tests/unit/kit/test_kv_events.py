"""KV events that an engine hands out: what Dynamo's publishers get of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_worker.kit import kv_events
from dynamo_worker.kit.kv_events import (
    Block,
    Created,
    KvEvent,
    KvEventForwarder,
    KvEventSource,
    Removed,
    Stored,
    signed,
)
from dynamo_worker.kit.request_metadata import SALT_PREFIX


class Publisher:
    """Takes what is published."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.batches: list[Any] = []

    def publish_batch(self, events: list[Any]) -> None:
        self.batches.append(events)


def published(monkeypatch: pytest.MonkeyPatch, *events: KvEvent, ranks: int = 1) -> dict[int, list[Any]]:
    """Return the batches that each rank's publisher gets."""
    publishers: list[Publisher] = []

    def make(**options: Any) -> Publisher:
        publishers.append(Publisher(**options))
        return publishers[-1]

    monkeypatch.setattr(kv_events, "KvEventPublisher", make)
    endpoint: Any = object()
    KvEventForwarder(endpoint, range(ranks), 2, advice="buy a larger buffer").publish(events)
    assert all(each.options["endpoint"] is endpoint and each.options["kv_block_size"] == 2 for each in publishers)
    return {publisher.options["dp_rank"]: publisher.batches for publisher in publishers}


def test_blocks_that_come_and_go_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored([Block(2**64 - 1, [1, 2]), Block(7, [3, 4])], 2**63, "adapter", SALT_PREFIX + "tenant")
    events = (KvEvent(0, 4, Created()), KvEvent(0, 5, stored), KvEvent(0, 6, None), KvEvent(0, 7, Removed([7])))
    ((first, second),) = published(monkeypatch, *events)[0]
    assert first == {
        "type": "stored",
        "token_ids": [1, 2, 3, 4],
        "num_block_tokens": [2, 2],
        "block_hashes": [-1, 7],
        "parent_hash": -(2**63),
        "block_mm_infos": None,
        "lora_name": "adapter",
        "cache_salt": "tenant",
    }
    assert second == {"type": "removed", "block_hashes": [7]}


def test_blocks_that_are_not_full_are_unknown_to_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    events = (
        KvEvent(0, 1, Stored([Block(5, [1, 2]), Block(6, [3])])),
        KvEvent(0, 2, Removed([6])),
        KvEvent(0, 3, Stored([Block(6, [3, 4])])),
        KvEvent(0, 4, Removed([6, 5])),
    )
    (batch,) = published(monkeypatch, *events)[0]
    assert [each["block_hashes"] for each in batch] == [[5], [6], [6, 5]]


def test_only_the_largest_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    events = (
        KvEvent(0, 1, Created(), 4096),
        KvEvent(0, 2, Created(), 128),
        KvEvent(0, 3, Stored([Block(5, [1, 2])]), 128),
        KvEvent(0, 4, Stored([Block(6, [1, 2])]), 4096),
        KvEvent(0, 5, Removed([5]), 128),
    )
    (batch,) = published(monkeypatch, *events)[0]
    assert [each["block_hashes"] for each in batch] == [[6]]


def test_every_rank_has_its_own_publisher_numbers_and_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = (
        KvEvent(1, 1, Stored([Block(5, [1])])),
        KvEvent(0, 1, Stored([Block(5, [1, 2])])),
        KvEvent(0, 2, Removed([5])),
        KvEvent(7, 9, Stored([Block(8, [1, 2])])),
    )
    found = published(monkeypatch, *events, ranks=2)
    assert [each["block_hashes"] for each in found[0][0]] == [[5], [5]]
    assert found[1] == []
    assert "lost" not in caplog.text


def test_a_gap_is_reported_with_what_to_do(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    published(monkeypatch, KvEvent(0, 1, None), KvEvent(0, 3, None))
    assert "KV events were lost" in caplog.text
    assert "buy a larger buffer" in str(vars(caplog.records[0]))


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (-1, -1)])
def test_hashes_are_signed(value: int, expected: int) -> None:
    assert signed(value) == expected


def test_events_that_an_engine_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    publishers: list[Publisher] = []

    def make(**options: Any) -> Publisher:
        publishers.append(Publisher(**options))
        return publishers[-1]

    monkeypatch.setattr(kv_events, "KvEventPublisher", make)
    news: list[Any] = [["5"], [], ["6"]]

    async def check() -> None:
        source = KvEventSource(
            lambda: news.pop(0) if news else [],
            lambda event: KvEvent(0, int(event), Stored([Block(int(event), [1, 2])])),
            range(1),
            2,
            advice="",
            name="toy-events",
        )
        endpoint: Any = object()
        poller = source.forward(endpoint)
        while len(publishers[0].batches) < 2:
            await asyncio.sleep(0.01)
        poller.stop()

    asyncio.run(asyncio.wait_for(check(), 10))
    assert [each["block_hashes"] for batch in publishers[0].batches for each in batch] == [[5], [6]]
