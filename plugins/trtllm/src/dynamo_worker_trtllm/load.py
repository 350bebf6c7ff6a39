"""What routers see of TensorRT-LLM: the load, and which prefixes its KV cache holds.

TensorRT-LLM hands both out through calls that block while a rank does not answer, and that return nothing when they
fail: they say nothing about the engine's health.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit.blocking import Poller
from dynamo_worker.kit.kv_events import Block, Created, KvEvent, KvEventForwarder, Removed, Stored
from dynamo_worker.kit.publishing import LoadPoller, RankLoad

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dynamo.runtime import Endpoint
    from tensorrt_llm.metrics import MetricsCollector

    from dynamo_worker.kit.publishing import LoadPublisher

#: Seconds that one call may wait for news.
_TIMEOUT: Final = 0.01


def _decoded(entry: Any) -> Any:
    return json.loads(entry) if isinstance(entry, (str, bytes)) else entry


def read_load(llm: Any, publisher: LoadPublisher, metrics: MetricsCollector | None) -> LoadPoller[Any]:
    """Read and publish the statistics of the ranks' iterations until the poller is stopped.

    :param metrics: also gets the statistics.
    """

    def load(entry: Any) -> RankLoad:
        stat = _decoded(entry)
        if metrics is not None:
            metrics.log_iteration_stats(stat)
        requests = int(stat.get("numActiveRequests") or 0) + int(stat.get("numQueuedRequests") or 0)
        return RankLoad(
            int(stat.get("attentionDpRank") or 0), requests, (stat.get("kvCacheStats") or {}).get("usedNumBlocks")
        )

    return LoadPoller(lambda: llm.get_stats(timeout=_TIMEOUT), load, publisher, "trtllm-stats")


def forward_kv_events(llm: Any, endpoint: Endpoint, ranks: Iterable[int], block_size: int) -> Poller[list[Any]]:
    """Forward TensorRT-LLM's KV events to routers until the poller is stopped.

    :param ranks: the data-parallel ranks, which have a KV cache each.
    :param block_size: tokens in one block.
    """
    advice = "raise kv_cache_config.event_buffer_max_size"
    forwarder = KvEventForwarder(endpoint, ranks, block_size, advice=advice)
    return Poller(
        lambda: llm.get_kv_cache_events(timeout=_TIMEOUT),
        lambda events: forwarder.publish(map(kv_event, map(_decoded, events))),
        "trtllm-kv-events",
    )


def kv_event(event: Mapping[str, Any]) -> KvEvent:
    """Return an event of TensorRT-LLM as the kit has it."""
    data = event["data"]
    change: Created | Stored | Removed | None = None
    if data["type"] == "created":
        change = Created()
    elif data["type"] == "removed":
        change = Removed(data["block_hashes"])
    elif data["type"] == "stored":
        blocks = [
            Block(block["block_hash"], [each["token_id"] for each in block["tokens"]]) for block in data["blocks"]
        ]
        salt = data.get("cache_salt") or data["blocks"][0].get("cache_salt")
        change = Stored(blocks, data.get("parent_hash"), data.get("lora_name"), salt)
    return KvEvent(int(event.get("attention_dp_rank") or 0), event["event_id"], change, event.get("window_size"))
