"""What routers are told about an engine: how full its KV cache is, and which blocks it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo.llm import KvEventPublisher, WorkerMetricsPublisher

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dynamo.runtime import Endpoint

log = get_logger(__name__)


class LoadPublisher:
    """Tells routers how full the KV cache of each data-parallel rank is."""

    def __init__(self) -> None:
        self._publisher: WorkerMetricsPublisher | None = None
        self._used: dict[int, int] = {}

    async def attach(self, endpoint: Endpoint, ranks: Iterable[int]) -> None:
        """Start publishing; what was reported before is published now."""
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


def publish_kv_events(
    endpoint: Endpoint, block_size: int, sources: Mapping[int, str], topic: str
) -> list[KvEventPublisher]:
    """Pass an engine's KV events on to routers, those of each data-parallel rank by a publisher of its own.

    Returns the publishers: they work as long as they are referenced.

    :param block_size: tokens in one block.
    :param sources: ZMQ address on which each rank publishes; one that means "everywhere" is taken as this machine.
    """
    publishers = []
    for rank, source in sources.items():
        address = source.replace("*", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - it is replaced
        publishers.append(
            KvEventPublisher(
                endpoint=endpoint,
                kv_block_size=block_size,
                dp_rank=rank,
                enable_local_indexer=True,
                zmq_endpoint=address,
                zmq_topic=topic,
            )
        )
        log.info("KV events are published", rank=rank, source=address)
    return publishers
