"""Blocks of the KV cache: a pool, reuse by prefix, eviction of the least recently used, and their events."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Block:
    hash: int
    parent: int | None
    users: int = 0
    children: int = 0


@dataclass(slots=True)
class Allocation:
    """Blocks that a request holds: `reused` from the prefix, `fresh` of its own; `stored` are in the tree."""

    reused: int
    fresh: int
    stored: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return len(self.stored) + self.fresh


def block_hash(parent: int | None, tokens: list[int], lora: int, salt: str | None) -> int:
    """Return the hash of a block: of its tokens and of everything before them (63 bits)."""
    data = repr((parent, tokens, lora, salt)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class KvCacheManager:
    """The pool of one attention-DP rank.

    `events` holds at most `event_buffer_max_size` of them; the oldest are lost, which leaves a gap in their ids.
    """

    def __init__(
        self,
        max_blocks: int,
        tokens_per_block: int,
        reuse: bool,
        event_buffer: int,
        attention_dp_rank: int | None,
        window: int,
    ) -> None:
        self.max_blocks = max_blocks
        self.tokens_per_block = tokens_per_block
        self._reuse = reuse
        self._rank = attention_dp_rank
        self._window = window
        self._tree: OrderedDict[int, _Block] = OrderedDict()
        self._in_use = 0
        self._events: deque[dict[str, Any]] | None = deque(maxlen=event_buffer) if event_buffer and reuse else None
        self._next_event = 0
        self.alloc_total = 0
        self.alloc_new = 0
        self.reused_total = 0
        self.missed_total = 0
        self._emit({"type": "created", "num_blocks_per_cache_level": [max_blocks, 0]})

    @property
    def used(self) -> int:
        """Blocks that running requests hold."""
        return self._in_use + sum(1 for block in self._tree.values() if block.users)

    def needed(self, tokens: int) -> int:
        """Return how many blocks hold `tokens` tokens."""
        return -(-tokens // self.tokens_per_block)

    def acquire(self, prompt: list[int], total: int, lora: int, salt: str | None) -> Allocation | None:
        """Reserve the blocks of `total` tokens, those of a known prefix shared; None while they do not fit.

        The last prompt token is always computed, so a prompt of whole blocks reuses all but its last block.
        """
        matched = self._match(prompt, lora, salt)
        fresh = self.needed(total) - len(matched)
        for key in matched:
            self._tree[key].users += 1
        if self.used + fresh > self.max_blocks:
            for key in matched:
                self._tree[key].users -= 1
            return None
        self._evict(self._in_use + fresh + len(self._tree) - self.max_blocks)
        for key in reversed(matched):
            self._tree.move_to_end(key)
        self._in_use += fresh
        self.alloc_total += fresh
        self.alloc_new += fresh
        self.reused_total += len(matched)
        self.missed_total += max(self.needed(len(prompt)) - len(matched), 0)
        return Allocation(reused=len(matched), fresh=fresh, stored=matched)

    def _match(self, prompt: list[int], lora: int, salt: str | None) -> list[int]:
        matched: list[int] = []
        parent: int | None = None
        size = self.tokens_per_block
        for start in range(0, (len(prompt) - 1) // size * size if self._reuse else 0, size):
            parent = block_hash(parent, prompt[start : start + size], lora, salt)
            if parent not in self._tree:
                break
            matched.append(parent)
        return matched

    def store(self, held: Allocation, tokens: list[int], lora: int, salt: str | None, lora_name: str | None) -> None:
        """Put the full blocks of `tokens` into the tree, so that others can reuse them."""
        size = self.tokens_per_block
        if not self._reuse:
            return
        first: int | None = held.stored[-1] if held.stored else None
        parent = first
        added: list[dict[str, Any]] = []
        for start in range(len(held.stored) * size, len(tokens) // size * size, size):
            if held.fresh == 0:
                break
            block = tokens[start : start + size]
            key = block_hash(parent, block, lora, salt)
            known = self._tree.get(key)
            if known is None:
                self._tree[key] = _Block(key, parent, users=1)
                if parent is not None:
                    self._tree[parent].children += 1
                entry: dict[str, Any] = {
                    "type": "stored_block",
                    "block_hash": key,
                    "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in block],
                    "cache_level": 0,
                    "priority": 35,
                    "mm_keys": [],
                }
                if lora:
                    entry["lora_id"] = lora
                if salt is not None:
                    entry["cache_salt"] = salt
                added.append(entry)
            else:
                if added:
                    self._stored(first, added, lora_name)
                    added = []
                known.users += 1
                first = key
            held.fresh -= 1
            self._in_use -= 1
            held.stored.append(key)
            parent = key
        if added:
            self._stored(first, added, lora_name)

    def release(self, held: Allocation) -> None:
        """Give the blocks back; those in the tree stay there until they are evicted."""
        self._in_use -= held.fresh
        held.fresh = 0
        for key in reversed(held.stored):
            self._tree[key].users -= 1
            self._tree.move_to_end(key)
        held.stored = []

    def reset(self) -> None:
        """Forget all blocks that nobody holds."""
        self._evict(len(self._tree))

    def _evict(self, count: int) -> None:
        removed: list[int] = []
        while count > len(removed):
            victim = next((b for b in self._tree.values() if not b.users and not b.children), None)
            if victim is None:
                break
            del self._tree[victim.hash]
            if victim.parent is not None:
                self._tree[victim.parent].children -= 1
            removed.append(victim.hash)
        if removed:
            self._emit({"type": "removed", "block_hashes": removed})

    def _stored(self, parent: int | None, blocks: list[dict[str, Any]], lora_name: str | None) -> None:
        data: dict[str, Any] = {"type": "stored", "parent_hash": parent, "blocks": blocks}
        if lora_name is not None:
            data["lora_name"] = lora_name
        self._emit(data)

    def _emit(self, data: dict[str, Any]) -> None:
        if self._events is None:
            return
        event: dict[str, Any] = {"event_id": self._next_event, "data": data, "window_size": self._window}
        if self._rank is not None:
            event["attention_dp_rank"] = self._rank
        self._next_event += 1
        self._events.append(event)

    def drain_events(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        if self._events is None:
            return []
        events = list(self._events)
        self._events.clear()
        return events

    def stats(self) -> dict[str, Any]:
        """Return `kvCacheStats` of one iteration."""
        used = self.used
        seen = self.reused_total + self.missed_total
        return {
            "maxNumBlocks": self.max_blocks,
            "freeNumBlocks": self.max_blocks - used,
            "usedNumBlocks": used,
            "tokensPerBlock": self.tokens_per_block,
            "allocTotalBlocks": self.alloc_total,
            "allocNewBlocks": self.alloc_new,
            "reusedBlocks": self.reused_total,
            "missedBlocks": self.missed_total,
            "cacheHitRate": self.reused_total / seen if seen else 0.0,
        }
