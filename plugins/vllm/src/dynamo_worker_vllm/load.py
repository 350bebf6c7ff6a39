"""What routers and operators see of vLLM: load, KV events, the hit rate of its prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo_worker.kit.publishing import KvEvents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker.kit.publishing import LoadPublisher


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


def kv_events(llm: AsyncLLM, ranks: Iterable[int]) -> KvEvents | None:
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
    return KvEvents(sources, events.topic, llm.vllm_config.cache_config.block_size)
