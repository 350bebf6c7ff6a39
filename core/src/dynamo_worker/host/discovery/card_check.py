"""Finds out whether frontends will ignore a worker, because another one serves the same model with another card.

A frontend keeps the first card of a model, an endpoint's namespace and a kind of worker. It ignores workers whose cards
differ in what it hashes (``mdcsum`` of the runtime), and says so in its own log only (measured on 1.6.1).
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Where all backends keep model cards.
CARDS: Final = "v1/mdc/"
#: Most cards of other workers that are looked at.
MOST_CARDS: Final = 64
#: The items of a card that frontends compare: files by their checksums, and plain values.
_FILES: Final = ("model_info", "tokenizer", "prompt_formatter", "chat_template_file", "gen_config")
_VALUES: Final = (
    "model_input",  # not compared, but frontends send all workers of a model requests of one kind
    *("source_path", "context_length", "kv_cache_block_size", "needs", "router_config", "aliases"),
)


def from_base64(value: str) -> bytes:
    """Return what etcd's gateway has encoded; nothing if it is no base64."""
    try:
        return base64.b64decode(value)
    except binascii.Error:
        return b""


def differences(own: Iterable[bytes], others: Iterable[bytes]) -> tuple[str, list[str]] | None:
    """Return a model and the items in which another worker's card of it differs; None if there is no such card.

    :param own: the entries with this worker's cards; entries that cannot be read count as missing.
    :param others: those of other workers of the same endpoint.
    """
    known = {_identity(card): card for entry in own if (card := _card(entry)) is not None}
    for entry in others:
        card = _card(entry)
        mine = None if card is None else known.get(_identity(card))
        if card is None or mine is None:
            continue
        differing = [name for name in _FILES if _checksums(card.get(name)) != _checksums(mine.get(name))]
        differing += [name for name in _VALUES if card.get(name) != mine.get(name)]
        if differing:
            return str(card.get("display_name")), differing
    return None


def _card(entry: bytes) -> dict[str, Any] | None:
    try:
        card = json.loads(entry)["card_json"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return card if isinstance(card, dict) else None


def _identity(card: dict[str, Any]) -> tuple[str, str]:
    return str(card.get("display_name")), str(card.get("worker_type"))


def _checksums(item: object) -> list[str]:
    """Return the checksums anywhere in an item; the paths beside them differ between workers."""
    if not isinstance(item, dict):
        return []
    found = [str(item["checksum"])] if "checksum" in item else []
    for value in item.values():
        found += _checksums(value)
    return found
