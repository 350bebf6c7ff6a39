"""What routers and operators see of SGLang: load, KV events, Prometheus metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prometheus_client import multiprocess

from dynamo_worker.kit.metrics import PrefixCollector
from dynamo_worker.kit.publishing import KvEvents

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import CollectorRegistry

    from dynamo_worker.kit.publishing import LoadPublisher
    from dynamo_worker_sglang.manager import Manager

#: Seconds between two readings of the load, which the schedulers write into shared memory.
_POLL_SECONDS = 0.1
#: Prefix of SGLang's metrics.
_PREFIX = "sglang:"


class LoadReader:
    """Reads the load that the schedulers report.

    :ivar steps: number of readings in which their work had advanced.
    """

    def __init__(self, manager: Manager, page_size: int) -> None:
        self._reader = manager.load_snapshot_reader
        self._page_size = page_size
        self._seen: dict[int, tuple[int, ...]] = {}
        self.steps = 0

    def read(self) -> dict[int, int]:
        """Return the number of KV blocks in use on each data-parallel rank."""
        loads = list(self._reader.read_all())
        for load in loads:
            work = (load.num_used_tokens, load.total_prefill_uncached_tokens, load.total_prefill_busy_us)
            if self._seen.get(load.dp_rank) != work:
                self._seen[load.dp_rank] = work
                self.steps += 1
        return self._used_blocks(loads)

    def used_blocks(self) -> dict[int, int]:
        """Return the same without counting a reading; any thread may call it."""
        return self._used_blocks(self._reader.read_all())

    def _used_blocks(self, loads: Iterable[Any]) -> dict[int, int]:
        return {load.dp_rank: -(-load.num_used_tokens // self._page_size) for load in loads}

    def in_flight(self) -> int:
        """Return the number of requests whose KV cache a prefill worker holds for decode workers."""
        loads = [load.disaggregation for load in self._reader.read_all()]
        return sum(load.prefill_bootstrap_queue_reqs + load.prefill_inflight_queue_reqs for load in loads if load)

    async def publish(self, publisher: LoadPublisher) -> None:
        """Publish the load whenever it changes."""
        while True:
            for rank, blocks in self.read().items():
                publisher.publish(rank, blocks)
            await asyncio.sleep(_POLL_SECONDS)


def kv_events(configuration: str | None, ranks: Iterable[int], block_size: int) -> KvEvents | None:
    """Return where each data-parallel rank publishes its KV events; None if it does not."""
    from sglang.srt.disaggregation.kv_events import KVEventsConfig, ZmqEventPublisher

    if not configuration:
        return None
    events = KVEventsConfig.from_cli(configuration)
    if events.publisher != "zmq":
        return None
    sources = {rank: ZmqEventPublisher.offset_endpoint_port(events.endpoint, rank) for rank in ranks}
    return KvEvents(sources, events.topic, block_size)


def add_metrics(registry: CollectorRegistry) -> None:
    """Add the metrics of all of SGLang's processes, which it has with ``--enable-metrics``.

    The schedulers write theirs into files. Those of this process are in its own registry, because it imported
    prometheus_client before SGLang set the directory of the files.
    """
    registry.register(PrefixCollector(_PREFIX))
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
