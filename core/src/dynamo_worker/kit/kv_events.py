"""KV events of an engine that hands them out itself, for routers: which blocks its KV caches hold.

An engine that publishes on ZMQ sockets needs :func:`~dynamo_worker.kit.publishing.publish_kv_events` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dynamo.llm import KvEventPublisher

from dynamo_worker.kit import request_metadata
from dynamo_worker.kit.blocking import Poller
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dynamo.runtime import Endpoint

log = get_logger(__name__)

_BITS: Final = 64


class Block(NamedTuple):
    """One block of a KV cache.

    :param key: its hash, an integer of up to 64 bits with or without a sign.
    :param tokens: the tokens whose keys and values it holds; it may have room for more.
    """

    key: int
    tokens: Sequence[int]


class Created(NamedTuple):
    """A KV cache was created; the event states its attention window."""


class Stored(NamedTuple):
    """Blocks were filled, each with the tokens that follow those of the one before.

    :param parent: hash of the block before the first one; None at the start of a prompt.
    :param lora_name: the LoRA adapter of the request.
    :param cache_salt: the request's, as :func:`~dynamo_worker.kit.request_metadata.cache_salt` returns it.
    """

    blocks: Sequence[Block]
    parent: int | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class Removed(NamedTuple):
    """Blocks were evicted.

    :param keys: their hashes.
    """

    keys: Sequence[int]


class KvEvent(NamedTuple):
    """One change of a KV cache.

    :param rank: the data-parallel rank that has the cache.
    :param number: counts the rank's events without gaps.
    :param change: what happened; None for what routers need not know.
    :param window: attention window of the layers concerned, in tokens; None if the engine has only one kind.
    """

    rank: int
    number: int
    change: Created | Stored | Removed | None
    window: int | None = None


class KvEventForwarder:
    """Forwards an engine's KV events to routers, with one publisher for each data-parallel rank.

    Routers learn of full blocks only, and of those with the largest attention window: prefixes that a smaller window
    has left behind can be computed from no cache.
    """

    def __init__(self, endpoint: Endpoint, ranks: Iterable[int], block_size: int, *, advice: str) -> None:
        """Announce the publishers.

        :param ranks: the data-parallel ranks, which have a KV cache each.
        :param block_size: tokens in one block.
        :param advice: what an operator can do if events are lost.
        """
        self._block_size = block_size
        self._advice = advice
        self._publishers = {
            rank: KvEventPublisher(endpoint=endpoint, kv_block_size=block_size, dp_rank=rank, enable_local_indexer=True)
            for rank in ranks
        }
        self._window: int | None = None
        self._last: dict[int, int] = {}
        #: Blocks that are not full, by rank.
        self._partial: dict[int, set[int]] = {rank: set() for rank in self._publishers}

    def publish(self, events: Iterable[KvEvent]) -> None:
        """Publish events, each rank's in its order; those of other ranks are dropped."""
        batches: dict[int, list[Any]] = {}
        for event in events:
            if event.rank in self._publishers:
                self._note_gap(event)
                batches.setdefault(event.rank, []).extend(self._translated(event))
        for rank, batch in batches.items():
            if batch:
                self._publishers[rank].publish_batch(batch)

    def _note_gap(self, event: KvEvent) -> None:
        last, self._last[event.rank] = self._last.get(event.rank), event.number
        if last is not None and event.number != last + 1:
            log.warning("KV events were lost: routing gets worse", rank=event.rank, after=last, next=self._advice)

    def _translated(self, event: KvEvent) -> Iterator[dict[str, Any]]:
        change, window = event.change, event.window
        if isinstance(change, Created):
            self._window = max(self._window or 0, window or 0) or None
        elif window is not None and self._window is not None and window != self._window:
            return
        elif isinstance(change, Stored):
            yield from self._stored(change, self._partial[event.rank])
        elif isinstance(change, Removed):
            partial, keys = self._partial[event.rank], [signed(key) for key in change.keys]
            known = [key for key in keys if key not in partial]
            partial.difference_update(keys)
            if known:
                yield {"type": "removed", "block_hashes": known}

    def _stored(self, change: Stored, partial: set[int]) -> Iterator[dict[str, Any]]:
        tokens: list[int] = []
        keys: list[int] = []
        for block in change.blocks:
            if len(block.tokens) < self._block_size:
                partial.add(signed(block.key))
                break
            keys.append(signed(block.key))
            tokens.extend(block.tokens)
        if keys:
            salt = change.cache_salt
            yield {
                "type": "stored",
                "token_ids": tokens,
                "num_block_tokens": [self._block_size] * len(keys),
                "block_hashes": keys,
                "parent_hash": None if change.parent is None else signed(change.parent),
                "block_mm_infos": None,
                "lora_name": change.lora_name,
                "cache_salt": None if salt is None else salt.removeprefix(request_metadata.SALT_PREFIX),
            }


@dataclass(frozen=True)
class KvEventSource:
    """KV events that an engine hands out through a call that may block.

    :param read: returns the new events; called in a thread.
    :param translate: returns one event as it is here.
    :param ranks: the data-parallel ranks, which have a KV cache each.
    :param block_size: tokens in one block.
    :param advice: what an operator can do if events are lost.
    :param name: of the thread.
    """

    read: Callable[[], Iterable[Any]]
    translate: Callable[[Any], KvEvent]
    ranks: Iterable[int]
    block_size: int
    advice: str
    name: str

    def forward(self, endpoint: Endpoint) -> Poller[Iterable[Any]]:
        """Forward the events to routers until the poller is stopped."""
        forwarder = KvEventForwarder(endpoint, self.ranks, self.block_size, advice=self.advice)
        return Poller(self.read, lambda events: forwarder.publish(map(self.translate, events)), self.name)


def signed(value: int) -> int:
    """Return the signed 64-bit number with the same bits, which is what Dynamo's publisher takes."""
    value &= 2**_BITS - 1
    return value - 2**_BITS if value >= 2 ** (_BITS - 1) else value
