"""What routers, the planner and operators see of vLLM: load, KV events, forward-pass metrics, cache hits."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo_worker.kit import forward_pass_metrics, publishing
from dynamo_worker.kit.publishing import KvEvents
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import forward_passes, images, waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker.kit.publishing import LoadPublisher

log = get_logger(__name__)

#: vLLM's kinds of KV caches with a block for every token.
_FULL_ATTENTION: Final = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
#: Seconds within which an engine that has just started describes its KV caches.
_ANSWER_SECONDS: Final = 30.0


def stat_logger(load: LoadPublisher) -> Callable[[VllmConfig, int], StatLoggerBase]:
    """Return the factory of the objects, one for each data-parallel rank, that vLLM calls after every step."""
    return lambda config, rank: _StatLogger(load, config, rank)


class _StatLogger(StatLoggerBase):  # type: ignore[misc]
    def __init__(self, load: LoadPublisher, config: VllmConfig, rank: int) -> None:
        self._load = load
        self._cache = config.cache_config
        self._ranks = max(1, config.parallel_config.data_parallel_size_local)
        self._rank = rank

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            blocks = (self._cache.num_gpu_blocks or 0) / self._ranks
            self._load.publish(self._rank, round(blocks * scheduler_stats.kv_cache_usage))

    def log_engine_initialized(self) -> None:
        pass


def hit_rates() -> Mapping[int, float]:
    """Return which part of the prompts' tokens each rank's prefix cache had since the start, from vLLM's counters."""
    counts: dict[str, dict[int, float]] = {"vllm:prefix_cache_queries": {}, "vllm:prefix_cache_hits": {}}
    for family in REGISTRY.collect():
        ranks = counts.get(family.name)
        if ranks is not None:
            ranks.update((int(s.labels["engine"]), s.value) for s in family.samples if s.name.endswith("_total"))
    queries, hits = counts.values()
    return {rank: hits.get(rank, 0.0) / count for rank, count in queries.items() if count}


async def block_size(llm: AsyncLLM) -> int:
    """Return the number of tokens in one block of the KV cache, as KV events state it.

    A model with several kinds of layers has as many KV caches, with blocks of different sizes. Routers follow the one
    of full attention, in which every token of a prefix has its place. The configuration states another number.
    """
    configured: int = llm.vllm_config.cache_config.block_size
    try:
        question = llm.engine_core.call_utility_async("get_kv_cache_group_metadata")
        groups = await asyncio.wait_for(question, _ANSWER_SECONDS)
    except Exception as error:
        log.warning("vLLM does not describe its KV caches", error=error, block_size=configured)
        return configured
    return main_block_size(groups, configured)


def main_block_size(groups: Iterable[Mapping[str, Any]], default: int) -> int:
    """Return the block size of the first KV cache of full attention.

    :param groups: vLLM's description of its KV caches.
    :param default: for a model without full attention.
    """
    sizes = (group.get("block_size") for group in groups if group.get("kind") in _FULL_ATTENTION)
    return int(next(sizes, None) or default)


def kv_events(llm: AsyncLLM, ranks: Iterable[int], block_size: int) -> KvEvents | None:
    """Return where each data-parallel rank publishes its KV events; None if it does not."""
    from vllm.distributed.kv_events import ZmqEventPublisher

    events = llm.vllm_config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        return None
    # With port 0 only the engine knows the port that it listens on.
    known = llm.get_kv_event_sources()
    sources = {
        rank: known[rank].endpoint if rank in known else ZmqEventPublisher.offset_endpoint_port(events.endpoint, rank)
        for rank in ranks
    }
    model = llm.model_config.model
    token = publishing.image_token(model, model) if images.most_per_request(llm) else None
    return KvEvents(sources, events.topic, block_size, token)


def measure_forward_passes(config: VllmConfig, worker_id: int, private_dir: Path) -> None:
    """Have the EngineCores that are started with this configuration publish what their schedulers do.

    :param private_dir: directory of the sockets.
    """
    if config.parallel_config.data_parallel_backend == "ray":
        # It starts them on any machine, with an environment of its own.
        log.warning("Forward-pass metrics are not published: ray starts the EngineCores")
        return
    scheduler = config.scheduler_config
    settings = {
        "scheduler": scheduler.scheduler_cls,
        "worker_id": str(worker_id),
        "address": forward_pass_metrics.address(private_dir),
    }
    os.environ[waiting.FORWARD_PASSES] = json.dumps(settings)
    made_by = forward_passes.measured_scheduler
    scheduler.scheduler_cls = f"{made_by.__module__}.{made_by.__name__}"
