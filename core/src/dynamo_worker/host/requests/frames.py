"""Frames: consecutive chunks of a stream joined into one, and the memory that a chunk takes."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Mapping

    from dynamo_worker.engine import Chunk

#: Most tokens in a frame of several chunks, and most with alternatives: the runtime encodes a frame in one go while it
#: holds the interpreter, and the frontend decodes it the same way.
_MOST_TOKENS: Final = 256
_MOST_LISTED: Final = 16
#: Units of a chunk with alternatives to its tokens. They take a dictionary for each alternative, which the garbage
#: collector visits again and again.
_LISTED_UNITS: Final = 16
#: Weight of a chunk and of an alternative in its ``top_logprobs``; a token weighs 1. One unit is about 40 bytes.
CHUNK_WEIGHT: Final = 8
#: Bytes in a unit.
_UNIT: Final = 40
_ALTERNATIVE_WEIGHT: Final = 10

#: The keys of a chunk that can be joined with the next one. All but ``index`` are lists with one entry for each token.
_LISTS: Final = ("token_ids", "log_probs", "top_logprobs")
_JOINABLE: Final = frozenset({*_LISTS, "index"})


def joined(chunks: deque[Chunk]) -> tuple[Chunk, int]:
    """Take chunks from the left that fit into one frame; return them as one chunk, and how many they were."""
    last = chunks.popleft()
    group: list[Any] = [last]
    if chunks and type(last.get("token_ids")) is list:
        room = (_MOST_LISTED if "top_logprobs" in last else _MOST_TOKENS) - len(last["token_ids"])
        while chunks and _continues(last, chunks[0]) and room >= len(chunks[0]["token_ids"]):
            last = chunks.popleft()
            room -= len(last["token_ids"])
            group.append(last)
    if len(group) == 1:
        return last, 1
    whole: Any = dict(last)
    for name in _LISTS:
        if last.get(name) is not None:
            whole[name] = list(chain.from_iterable(chunk[name] for chunk in group))
    return whole, len(group)


def _continues(first: Chunk, second: Chunk) -> bool:
    """Return whether two consecutive chunks of a stream can be joined.

    The first may hold only tokens and their log probabilities; the second may end the stream.
    """
    if not first.keys() <= _JOINABLE or first.get("index") != second.get("index"):
        return False
    if type(second.get("token_ids")) is not list:
        return False
    for name in ("log_probs", "top_logprobs"):
        values, more = first.get(name), second.get(name)
        if (values is not None or more is not None) and not (type(values) is list and type(more) is list):
            return False
    return True


def weight(chunk: Mapping[str, object]) -> int:
    """Return the memory that a chunk takes, in units of about 40 bytes."""
    if "token_ids" not in chunk:  # text or embeddings
        return _size(chunk)
    tokens, top = chunk.get("token_ids"), chunk.get("top_logprobs")
    alternatives = sum(len(entry) for entry in top if type(entry) is list) if type(top) is list else 0
    return CHUNK_WEIGHT + _ALTERNATIVE_WEIGHT * alternatives + (len(tokens) if type(tokens) is list else 0)


def _size(value: object, levels: int = 16) -> int:
    """Return the memory that a chunk of text takes, in the same units; called for slow clients only.

    :param levels: how deep to look.
    """
    if isinstance(value, str):
        return 1 + len(value) // _UNIT
    if not levels or not isinstance(value, (dict, list, tuple)):
        return 1
    inside = value.values() if isinstance(value, dict) else value
    return (CHUNK_WEIGHT if isinstance(value, dict) else 2) + sum(_size(entry, levels - 1) for entry in inside)


def units(chunk: Chunk) -> int:
    """Return how much of its stream's room a chunk takes."""
    return 1 if chunk.get("top_logprobs") is None else _LISTED_UNITS
