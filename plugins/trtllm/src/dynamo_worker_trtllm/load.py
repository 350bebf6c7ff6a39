"""What routers see of TensorRT-LLM: the load, and which prefixes its KV cache holds.

TensorRT-LLM hands both out through calls that block while a rank does not answer, and that return nothing when they
fail: they say nothing about the engine's health.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm import KvEventPublisher

from dynamo_worker.kit import request_metadata
from dynamo_worker.kit.blocking import Poller
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from dynamo.runtime import Endpoint
    from tensorrt_llm.metrics import MetricsCollector

    from dynamo_worker.kit.publishing import LoadPublisher

log = get_logger(__name__)

#: Seconds that one call may wait for news.
_TIMEOUT: Final = 0.01
_BITS: Final = 64


def _decoded(entries: Iterable[Any]) -> list[dict[str, Any]]:
    return [json.loads(entry) if isinstance(entry, (str, bytes)) else entry for entry in entries]


class LoadReader:
    """Reads the statistics of the ranks' iterations.

    :ivar steps: number of iterations reported.
    """

    def __init__(self, llm: Any, publisher: LoadPublisher, metrics: MetricsCollector | None) -> None:
        """Start to read.

        :param metrics: also gets the statistics.
        """
        self.steps = 0
        self._metrics = metrics
        self._publisher = publisher
        self._held: dict[int, int] = {}
        self._poller = Poller(lambda: llm.get_stats(timeout=_TIMEOUT), self._take, "trtllm-stats")
        self.stop = self._poller.stop

    def held(self) -> int:
        """Return the number of requests that the ranks had when they last reported."""
        return sum(self._held.values())

    def _take(self, stats: list[Any]) -> None:
        for stat in _decoded(stats):
            rank = int(stat.get("attentionDpRank") or 0)
            self.steps += 1
            if self._metrics is not None:
                self._metrics.log_iteration_stats(stat)
            self._held[rank] = int(stat.get("numActiveRequests") or 0) + int(stat.get("numQueuedRequests") or 0)
            blocks = (stat.get("kvCacheStats") or {}).get("usedNumBlocks")
            if blocks is not None:
                self._publisher.publish(rank, int(blocks))


class KvEventForwarder:
    """Turns TensorRT-LLM's KV events into Dynamo's."""

    def __init__(self, llm: Any, endpoint: Endpoint, ranks: Iterable[int], block_size: int) -> None:
        """Start to forward.

        :param ranks: the data-parallel ranks, which have a KV cache each.
        :param block_size: tokens in one block.
        """
        self._block_size = block_size
        self._publishers: Mapping[int, KvEventPublisher] = {
            rank: KvEventPublisher(endpoint=endpoint, kv_block_size=block_size, dp_rank=rank, enable_local_indexer=True)
            for rank in ranks
        }
        #: The largest attention window: routers want to know the blocks of global attention only.
        self._window: int | None = None
        self._last_ids: dict[int, int] = {}
        #: Blocks that are not full, which routers are not told of.
        self._partial: set[int] = set()
        self._poller = Poller(lambda: llm.get_kv_cache_events(timeout=_TIMEOUT), self.publish, "trtllm-kv-events")
        self.stop = self._poller.stop

    def publish(self, events: Iterable[Any]) -> None:
        """Publish events, each rank's in its order."""
        batches: dict[int, list[Any]] = {}
        for event in _decoded(events):
            rank, number = int(event.get("attention_dp_rank") or 0), event["event_id"]
            last, self._last_ids[rank] = self._last_ids.get(rank), number
            if last is not None and number != last + 1:
                advice = "raise kv_cache_config.event_buffer_max_size"
                log.warning("KV events were lost: routing gets worse", rank=rank, after=last, next=advice)
            batches.setdefault(rank, []).extend(self._translated(event))
        for rank, batch in batches.items():
            if batch and rank in self._publishers:
                self._publishers[rank].publish_batch(batch)

    def _translated(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        data, window = event["data"], event.get("window_size")
        if data["type"] == "created":
            self._window = max(self._window or 0, window or 0) or None
        elif window is not None and self._window is not None and window != self._window:
            return
        elif data["type"] == "stored":
            yield from self._stored(data)
        elif data["type"] == "removed":
            hashes = [_signed(block) for block in data["block_hashes"]]
            known = [block for block in hashes if block not in self._partial]
            self._partial.difference_update(hashes)
            if known:
                yield {"type": "removed", "block_hashes": known}

    def _stored(self, data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        tokens: list[int] = []
        hashes: list[int] = []
        for block in data["blocks"]:
            if len(block["tokens"]) < self._block_size:
                self._partial.add(_signed(block["block_hash"]))
                break
            hashes.append(_signed(block["block_hash"]))
            tokens.extend(token["token_id"] for token in block["tokens"])
        if hashes:
            parent, salt = data.get("parent_hash"), data.get("cache_salt") or data["blocks"][0].get("cache_salt")
            yield {
                "type": "stored",
                "token_ids": tokens,
                "num_block_tokens": [self._block_size] * len(hashes),
                "block_hashes": hashes,
                "parent_hash": None if parent is None else _signed(parent),
                "block_mm_infos": None,
                "lora_name": data.get("lora_name"),
                "cache_salt": None if salt is None else salt.removeprefix(request_metadata.SALT_PREFIX),
            }


def _signed(value: int) -> int:
    """Return the signed 64-bit number with the same bits, which is what Dynamo's publisher takes."""
    value &= 2**_BITS - 1
    return value - 2**_BITS if value >= 2 ** (_BITS - 1) else value
