"""Flags of Dynamo's own workers on a command line: which are accepted, and which are refused by name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.peer_flags import ENGINES, PEER_FLAGS, REFUSED_VARIABLES, PeerFlag

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_NO: Final = ("", "0", "false", "no", "off", "none", "null")


def peer_flags(engine: str) -> dict[str, PeerFlag]:
    """Return the flags of Dynamo's own worker for an engine, by all their spellings."""
    return {flag: row for row in PEER_FLAGS if not row.engines or engine in row.engines for flag in row.flags}


def without_peer_flags(words: Sequence[str], engine: str, known: Collection[str]) -> list[str]:
    """Return the words of a command line without the flags that are accepted but change nothing.

    :param known: the flags of the engine's own parser.
    :raises UsageError: a flag is refused; the message says why, and what to do instead.
    """
    rows = peer_flags(engine)
    result: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "--":  # a command follows
            result += [word, *waiting]
            break
        flag, equals, value = word.partition("=")
        row = rows.get(flag)
        # An engine of somebody else may have a flag of its own by one of these names.
        if row is None or (flag in known and not row.engines):
            result.append(word)
            continue
        values = [value] if equals else [] if row.switch else _values(waiting, row.many)
        if row.verdict == "honoured" and row.switch and flag not in known and row.flag in known:
            # The engine's parser has the switch, but nothing that turns it off again.
            result = [word for word in result if word not in (row.flag, *row.aliases)]
        elif row.verdict == "honoured":
            _check_value(row, flag, values, flag in known)
            result += [word, *([] if equals else values)]
        elif row.verdict == "refused":
            _check_refused(row, flag, values)
    return result


def check_variables(engine: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse environment variables that make Dynamo's own worker do what this one does not.

    :raises UsageError: the message says why, and what to do instead.
    """
    # Somebody else's engine may well serve what the three here do not.
    rows = peer_flags(engine).values() if engine in ENGINES else ()
    refused = {row.env: row for row in rows if row.verdict == "refused" and row.env}
    for name, row in refused.items():
        given = environ.get(name, "").strip()
        if not _asks_for_nothing(given.split(), row):
            raise UsageError(f"{name}={given} is not supported: {row.text}")
    for name, text in REFUSED_VARIABLES.items():
        if environ.get(name, "").strip().lower() not in _NO:
            raise UsageError(f"{name}={environ[name]} is not supported: {text}")


def _values(waiting: list[str], many: bool) -> list[str]:
    values: list[str] = []
    while waiting and not waiting[0].startswith("--") and (many or not values):
        values.append(waiting.pop(0))
    return values


def _check_value(row: PeerFlag, flag: str, values: Sequence[str], known: bool) -> None:
    for value in values:
        if value in row.refuses:
            raise UsageError(f"{flag} {value} is not supported: {row.refuses[value]}")
    if not known:
        raise UsageError(f"{flag} is not supported with this engine", hint="leave it out")


def _check_refused(row: PeerFlag, flag: str, values: Sequence[str]) -> None:
    if flag.startswith("--no-") or ((values or row.many) and _asks_for_nothing(values, row)):
        return
    shown = " ".join((flag, *values)) if row.harmless else flag
    raise UsageError(f"{shown} is not supported: {row.text}")


def _asks_for_nothing(values: Sequence[str], row: PeerFlag) -> bool:
    words = (*row.harmless, *_NO) if row.switch or row.harmless else ("",)
    return all(value.lower() in words for value in values)
