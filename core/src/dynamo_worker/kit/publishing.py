"""What an engine publishes for routers: how full its KV cache is, and which blocks it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from dynamo.llm import KvEventPublisher, WorkerMetricsPublisher

from dynamo_worker.address import LOOPBACK
from dynamo_worker.kit.blocking import Poller
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from dynamo.runtime import Endpoint

log = get_logger(__name__)

_T = TypeVar("_T")


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

    def used_blocks(self) -> Mapping[int, int]:
        """Return the number of blocks in use on each rank, as last reported."""
        return dict(self._used)

    def publish(self, rank: int, used_blocks: int) -> None:
        """Publish the number of blocks in use on a rank if it has changed."""
        if self._used.get(rank) != used_blocks:
            self._used[rank] = used_blocks
            if self._publisher is not None:
                self._publisher.publish(rank, kv_used_blocks=used_blocks)


class RankLoad(NamedTuple):
    """One report of a data-parallel rank about its load.

    :param requests: number of requests that it has, running or waiting.
    :param used_blocks: number of KV blocks in use; None if the report does not say.
    """

    rank: int
    requests: int
    used_blocks: int | None


class LoadPoller(Generic[_T]):
    """Reads and publishes what an engine reports about its load, through calls that may block.

    :ivar steps: number of reports.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[_T]],
        translate: Callable[[_T], RankLoad],
        publisher: LoadPublisher,
        name: str,
    ) -> None:
        """Start to read.

        :param read: returns the engine's new reports; called in a thread.
        :param translate: returns what one report says; called on the event loop.
        :param name: of the thread.
        """
        self.steps = 0
        self._translate = translate
        self._publisher = publisher
        self._requests: dict[int, int] = {}
        self._poller = Poller(read, self._take, name)

    def stop(self) -> None:
        """Stop reading."""
        self._poller.stop()

    async def stopped(self, limit: float) -> None:
        """Stop reading, and wait for the call that is under way, for at most ``limit`` seconds."""
        await self._poller.stopped(limit)

    def requests(self) -> int:
        """Return the number of requests that the ranks had when they last reported."""
        return sum(self._requests.values())

    def _take(self, reports: Iterable[_T]) -> None:
        for report in reports:
            load = self._translate(report)
            self.steps += 1
            self._requests[load.rank] = load.requests
            if load.used_blocks is not None:
                self._publisher.publish(load.rank, load.used_blocks)


class KvEvents(NamedTuple):
    """Where an engine publishes its KV events.

    :param sources: the ZMQ address of each data-parallel rank; a wildcard host means this machine.
    :param topic: of the ZMQ messages.
    :param block_size: tokens in one block.
    :param image_token: the token of an image in a prompt, for routers that know which worker has an image
        (:func:`image_token`); None if they do not.
    """

    sources: Mapping[int, str]
    topic: str
    block_size: int
    image_token: int | None = None


def image_token(model: str, directory: str) -> int | None:
    """Return the token in whose place routers put what identifies an image.

    :param model: the name under which the model is registered, or its path.
    :param directory: of its configuration and tokenizer.
    :returns: None if frontends do not route this model's requests by images.
    """
    try:
        from dynamo._core import resolve_routing_image_token_id
    except ImportError:  # a runtime that was built without this
        return None
    token: int | None = resolve_routing_image_token_id(model, directory)
    return token


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
                image_token_id=events.image_token,
            )
        )
        log.info("KV events are published", rank=rank, source=address)
    return publishers
