"""What routers and operators see of vLLM: load, KV events, Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo_worker.kit.metrics import PrefixCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker.kit.publishing import LoadPublisher

#: Metrics of vLLM and of the KV caches that plug into it, in the process-wide registry.
_PREFIXES = ("vllm:", "lmcache:")


def stat_logger(load: LoadPublisher) -> Callable[[VllmConfig, int], StatLoggerBase]:
    """Return what makes, for each data-parallel rank, the object that vLLM tells about every step."""
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


def kv_event_sources(llm: AsyncLLM, ranks: Sequence[int]) -> dict[int, str]:
    """Return where each data-parallel rank publishes its KV events; empty if it does not."""
    from vllm.distributed.kv_events import ZmqEventPublisher

    events = llm.vllm_config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        return {}
    # With port 0 only the engine knows what it listens on.
    known = llm.get_kv_event_sources()
    return {
        rank: known[rank].endpoint if rank in known else ZmqEventPublisher.offset_endpoint_port(events.endpoint, rank)
        for rank in ranks
    }


def metrics_registry() -> CollectorRegistry:
    """Return a view of vLLM's own metrics without what else is in its registry."""
    registry = CollectorRegistry()
    registry.register(PrefixCollector(*_PREFIXES))
    return registry
