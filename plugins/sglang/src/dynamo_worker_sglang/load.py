"""What routers and operators see of SGLang: load, KV events, Prometheus metrics."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, multiprocess

from dynamo_worker.kit.metrics import PrefixCollector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.kit.publishing import LoadPublisher
    from dynamo_worker_sglang.manager import Manager

#: Seconds between two looks at the load. The scheduler writes it into shared memory; looking costs it nothing.
_POLL_SECONDS = 0.1
_PREFIX = "sglang:"


class LoadReader:
    """Reads what the schedulers say about their load.

    :ivar steps: how often their work was seen to have advanced.
    """

    def __init__(self, manager: Manager, page_size: int) -> None:
        self._reader = manager.load_snapshot_reader
        self._page_size = page_size
        self._seen: dict[int, tuple[int, ...]] = {}
        self.steps = 0

    def read(self) -> dict[int, int]:
        """Return how many KV blocks are in use, for each data-parallel rank."""
        used = {}
        for load in self._reader.read_all():
            used[load.dp_rank] = -(-load.num_used_tokens // self._page_size)
            work = (load.num_used_tokens, load.total_prefill_uncached_tokens, load.total_prefill_busy_us)
            if self._seen.get(load.dp_rank) != work:
                self._seen[load.dp_rank] = work
                self.steps += 1
        return used

    def in_flight(self) -> int:
        """Return the number of requests whose KV cache a prefill worker keeps for others."""
        loads = [load.disaggregation for load in self._reader.read_all()]
        return sum(load.prefill_bootstrap_queue_reqs + load.prefill_inflight_queue_reqs for load in loads if load)

    async def publish(self, publisher: LoadPublisher) -> None:
        """Publish the load whenever it has changed."""
        while True:
            for rank, blocks in self.read().items():
                publisher.publish(rank, blocks)
            await asyncio.sleep(_POLL_SECONDS)


def kv_event_sources(configuration: str | None, ranks: Sequence[int]) -> tuple[dict[int, str], str]:
    """Return where each data-parallel rank publishes its KV events, and under which topic; empty if it does not."""
    from sglang.srt.disaggregation.kv_events import KVEventsConfig, ZmqEventPublisher

    if not configuration:
        return {}, ""
    events = KVEventsConfig.from_cli(configuration)
    if events.publisher != "zmq":
        return {}, ""
    return {rank: ZmqEventPublisher.offset_endpoint_port(events.endpoint, rank) for rank in ranks}, events.topic


def metrics_registry() -> CollectorRegistry:
    """Return SGLang's metrics, those of all its processes; empty without ``--enable-metrics``."""
    registry = CollectorRegistry()
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        # The schedulers write theirs into files. Those of this process are in its registry: it had imported
        # prometheus_client before SGLang said where the files are.
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        registry.register(PrefixCollector(_PREFIX))
    return registry
