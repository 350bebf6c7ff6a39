"""Suggestions for misspelled words in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``, did you mean X?`` for the closest known word, or nothing.

    :param cutoff: minimum similarity, from 0 to 1.
    """
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {close[0]}?" if close else ""
