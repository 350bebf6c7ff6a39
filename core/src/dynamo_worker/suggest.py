"""Suggestions for misspelled words in messages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Letters of a name; what is longer is no misspelled name, and would take long to compare.
_LONGEST: Final = 64
#: Words whose presence turns the meaning round.
_NEGATIONS: Final = frozenset({"no", "not", "disable"})


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``, did you mean X?`` for the known word that was surely meant, or nothing.

    A wrong suggestion is worse than none. Names are compared by the words that dashes and underscores separate, as
    these carry the meaning: ``--max-tokens`` is not ``--min-tokens``, though most letters agree.
    """
    if len(word) > _LONGEST:
        return ""
    ranked = sorted((unlikeness, name) for name in set(known) if (unlikeness := _unlikeness(word, name)) is not None)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return ""
    return f", did you mean {ranked[0][1]}?"


def _unlikeness(given: str, known: str) -> tuple[int, int] | None:
    """Return how much two names differ: first in words, then in letters; None if they are different names."""
    wanted, offered = _parts(given), _parts(known)
    if "".join(wanted) == "".join(offered):
        return (0, 0)
    letters, lacking = _aligned(wanted, offered, strict=given.startswith("-"))
    matched = len(wanted) - len([part for part in lacking if part in wanted])
    if lacking and (len(lacking) > 1 or matched < 2 or not _NEGATIONS.isdisjoint(lacking)):
        return None
    return (len(lacking), letters)


def _parts(name: str) -> list[str]:
    return re.split(r"[-_]", name.lstrip("-").lower())


def _aligned(wanted: Sequence[str], offered: Sequence[str], *, strict: bool) -> tuple[int, list[str]]:
    """Pair the words of two names in order.

    :param strict: whether a word of three letters must have them all: short flags are names of their own.
    :return: letters that differ in the pairs, and the words without a partner.
    """
    # best[j]: the fewest words without a partner, the letters that differ and the words, for offered[:j].
    best: list[tuple[int, int, list[str]]] = [(j, 0, list(offered[:j])) for j in range(len(offered) + 1)]
    for i, one in enumerate(wanted):
        row = [(i + 1, 0, list(wanted[: i + 1]))]
        for j, other in enumerate(offered):
            choices = [_plus(row[j], other), _plus(best[j + 1], one)]
            letters = _difference(one, other, 0 if strict else 1)
            if letters is not None:
                choices.append((best[j][0], best[j][1] + letters, best[j][2]))
            row.append(min(choices, key=lambda choice: choice[:2]))
        best = row
    return best[-1][1], best[-1][2]


def _plus(so_far: tuple[int, int, list[str]], word: str) -> tuple[int, int, list[str]]:
    return so_far[0] + 1, so_far[1], [*so_far[2], word]


def _difference(one: str, other: str, of_three: int) -> int | None:
    """Return how many letters of two words differ; None if they are different words.

    A quarter of the letters may be wrong, so none in a word of two; or the words have a long beginning in common, as
    ``complete`` and ``completions``.

    :param of_three: how many letters may be wrong in a word of three.
    """
    longest = max(len(one), len(other))
    edits = _edits(one, other)
    if edits <= (of_three if longest == 3 else longest // 4):
        return edits
    shortest = min(len(one), len(other))
    common = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    return edits if common >= 5 and common >= 0.75 * shortest else None


def _edits(one: str, other: str) -> int:
    """Return the number of letters to insert, drop, replace or swap with their neighbour."""
    two_above: list[int] = []
    above = list(range(len(other) + 1))
    for i, a in enumerate(one):
        row = [i + 1]
        for j, b in enumerate(other):
            cost = min(above[j + 1] + 1, row[j] + 1, above[j] + (a != b))
            if i and j and a == other[j - 1] and b == one[i - 1]:
                cost = min(cost, two_above[j - 1] + 1)
            row.append(cost)
        two_above, above = above, row
    return above[-1]
