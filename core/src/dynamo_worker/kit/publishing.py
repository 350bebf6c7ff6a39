"""What an engine publishes for routers: how full its KV cache is, and which blocks it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo.llm import KvEventPublisher, WorkerMetricsPublisher

from dynamo_worker.address import LOOPBACK
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dynamo.runtime import Endpoint

log = get_logger(__name__)


class LoadPublisher:
    """Publishes the number of KV blocks in use on each data-parallel rank."""

    def __init__(self) -> None:
        self._publisher: WorkerMetricsPublisher | None = None
        self._used: dict[int, int] = {}

    async def attach(self, endpoint: Endpoint, ranks: Iterable[int]) -> None:
        """Start publishing, beginning with what was reported before."""
        publisher = WorkerMetricsPublisher()
        await publisher.create_endpoint(endpoint)
        self._publisher = publisher
        for rank in ranks:
            publisher.publish(rank, kv_used_blocks=self._used.get(rank, 0))

    def held_blocks(self) -> int:
        """Return the number of blocks in use on all ranks, as last reported."""
        return sum(self._used.values())

    def publish(self, rank: int, used_blocks: int) -> None:
        """Publish the number of blocks in use on a rank if it has changed."""
        if self._used.get(rank) != used_blocks:
            self._used[rank] = used_blocks
            if self._publisher is not None:
                self._publisher.publish(rank, kv_used_blocks=used_blocks)


class KvEvents(NamedTuple):
    """Where an engine publishes its KV events.

    :param sources: the ZMQ address of each data-parallel rank; a wildcard host means this machine.
    :param topic: of the ZMQ messages.
    :param block_size: tokens in one block.
    """

    sources: Mapping[int, str]
    topic: str
    block_size: int


def publish_kv_events(endpoint: Endpoint, events: KvEvents) -> list[KvEventPublisher]:
    """Forward an engine's KV events to routers, with one publisher for each data-parallel rank.

    :returns: the publishers, which work as long as they are referenced.
    """
    publishers = []
    for rank, source in events.sources.items():
        address = source.replace("*", LOOPBACK).replace("0.0.0.0", LOOPBACK)  # noqa: S104 - it is replaced
        publishers.append(
            KvEventPublisher(
                endpoint=endpoint,
                kv_block_size=events.block_size,
                dp_rank=rank,
                enable_local_indexer=True,
                zmq_endpoint=address,
                zmq_topic=events.topic,
            )
        )
        log.info("KV events are published", rank=rank, source=address)
    return publishers
