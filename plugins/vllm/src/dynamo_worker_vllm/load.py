"""What routers and operators see of the engine: KV events, load, Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo.llm import KvEventPublisher, WorkerMetricsPublisher
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dynamo.runtime import Endpoint
    from prometheus_client.core import Metric
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

log = get_logger(__name__)

#: Metrics of vLLM and of the KV caches that plug into it, in the process-wide registry.
_PREFIXES = ("vllm:", "lmcache:")


class LoadPublisher:
    """Tells routers how full the KV cache of each data-parallel rank is."""

    def __init__(self) -> None:
        self._publisher: WorkerMetricsPublisher | None = None
        self._used: dict[int, int] = {}

    def logger(self, config: VllmConfig, rank: int) -> StatLoggerBase:
        """Return what vLLM calls after every step of one rank."""
        return _StatLogger(self, config, rank)

    async def attach(self, endpoint: Endpoint, ranks: Iterable[int]) -> None:
        """Start publishing."""
        publisher = WorkerMetricsPublisher()
        await publisher.create_endpoint(endpoint)
        self._publisher = publisher
        for rank in ranks:
            publisher.publish(rank, kv_used_blocks=self._used.get(rank, 0))

    def held_blocks(self) -> int:
        """Return the number of blocks in use, over all ranks, as last reported."""
        return sum(self._used.values())

    def publish(self, rank: int, used_blocks: int) -> None:
        """Publish the number of blocks in use if it has changed."""
        if self._used.get(rank) != used_blocks:
            self._used[rank] = used_blocks
            if self._publisher is not None:
                self._publisher.publish(rank, kv_used_blocks=used_blocks)


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


def publish_kv_events(llm: AsyncLLM, endpoint: Endpoint, ranks: Sequence[int]) -> list[KvEventPublisher]:
    """Pass vLLM's KV events on to routers, those of each rank by a publisher of its own.

    Returns the publishers: they work as long as they are referenced.
    """
    from vllm.distributed.kv_events import ZmqEventPublisher

    events = llm.vllm_config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        return []
    # With port 0 only the engine knows what it listens on.
    sources = llm.get_kv_event_sources()
    publishers = []
    for rank in ranks:
        source = sources[rank].endpoint if rank in sources else events.endpoint
        address = source if rank in sources else ZmqEventPublisher.offset_endpoint_port(source, rank)
        address = address.replace("*", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - it is replaced
        publishers.append(
            KvEventPublisher(
                endpoint=endpoint,
                kv_block_size=llm.vllm_config.cache_config.block_size,
                dp_rank=rank,
                enable_local_indexer=True,
                zmq_endpoint=address,
                zmq_topic=events.topic,
            )
        )
        log.info("KV events are published", rank=rank, source=address)
    return publishers


class _OnlyVllm(Collector):
    def collect(self) -> Iterator[Metric]:
        for metric in REGISTRY.collect():
            if metric.name.startswith(_PREFIXES):
                yield metric


def metrics_registry() -> CollectorRegistry:
    """Return a view of vLLM's own metrics without what else is in its registry."""
    registry = CollectorRegistry()
    registry.register(_OnlyVllm())
    return registry
