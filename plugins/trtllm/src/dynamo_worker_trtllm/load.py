"""What routers see of TensorRT-LLM: the load, and which prefixes its KV cache holds.

TensorRT-LLM hands both out through calls that block while a rank does not answer, and that return nothing when they
fail: they say nothing about the engine's health.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit.kv_events import Block, Created, KvEvent, KvEventSource, Removed, Stored
from dynamo_worker.kit.publishing import LoadPoller, RankLoad

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tensorrt_llm.metrics import MetricsCollector

    from dynamo_worker.kit.publishing import LoadPublisher
    from dynamo_worker_trtllm.forward_passes import ForwardPasses

#: Seconds that one call may wait for news.
_TIMEOUT: Final = 0.01


def _decoded(entry: Any) -> Any:
    return json.loads(entry) if isinstance(entry, (str, bytes)) else entry


def read_load(
    llm: Any, publisher: LoadPublisher, metrics: MetricsCollector | None, forward_passes: ForwardPasses
) -> LoadPoller[Any]:
    """Read and publish the statistics of the ranks' iterations until the poller is stopped.

    :param metrics: also gets the statistics.
    :param forward_passes: likewise.
    """

    def load(entry: Any) -> RankLoad:
        stat = _decoded(entry)
        if metrics is not None:
            metrics.log_iteration_stats(stat)
        forward_passes.publish(stat)
        requests = int(stat.get("numActiveRequests") or 0) + int(stat.get("numQueuedRequests") or 0)
        return RankLoad(
            int(stat.get("attentionDpRank") or 0), requests, (stat.get("kvCacheStats") or {}).get("usedNumBlocks")
        )

    return LoadPoller(lambda: llm.get_stats(timeout=_TIMEOUT), load, publisher, "trtllm-stats")


def kv_events(llm: Any, ranks: Iterable[int]) -> KvEventSource | None:
    """Return how TensorRT-LLM hands out the KV events of its data-parallel ranks; None if it does not."""
    config = llm.args.kv_cache_config
    if not (config.event_buffer_max_size and config.enable_block_reuse):
        return None
    return KvEventSource(
        lambda: [_decoded(event) for event in llm.get_kv_cache_events(timeout=_TIMEOUT)],
        kv_event,
        ranks,
        int(config.tokens_per_block),
        advice="raise kv_cache_config.event_buffer_max_size",
        name="trtllm-kv-events",
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
