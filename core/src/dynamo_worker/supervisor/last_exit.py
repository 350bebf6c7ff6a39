"""The end of the last worker in a directory of flight records, for the metrics of the next one."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from dynamo_worker.supervisor import record_file
from dynamo_worker.supervisor.exit_kinds import ExitKind
from dynamo_worker.supervisor.recorder import CODE_OF_A_KILL


class LastExit(NamedTuple):
    """How the last worker ended.

    :param at: when, in seconds since the epoch.
    :param code: its exit code.
    :param kind: why.
    """

    at: float
    code: int
    kind: ExitKind


def last_exit(directory: str) -> LastExit | None:
    """Return how the last worker ended that has its record in a directory, or None if there is none.

    Workers that run do not count, so it may be asked by a worker that has a record there.
    """
    try:
        place = record_file.open_directory(directory)
    except OSError:
        return None
    try:
        over, _ = record_file.by_life(place)
        if not over:
            return None
        descriptor = record_file.open_record(place, over[-1])
        try:
            found = record_file.entries(record_file.read(descriptor))
        finally:
            os.close(descriptor)
    except OSError:  # pruned in this moment
        return None
    finally:
        os.close(place)
    return _end_of(found)


def _end_of(found: list[dict[str, object]]) -> LastExit | None:
    start = next((entry for entry in found if entry["event"] == "start"), {})
    began = _number(start.get("time"))
    if start.get("format") != record_file.FORMAT or not began:
        return None
    own = [entry for entry in found if entry.get("by") != "next start"]
    at = began + max((_number(entry.get("t")) for entry in own), default=0.0)
    end = next((entry for entry in reversed(found) if entry["event"] == "end"), {})
    try:
        kind = ExitKind(end.get("kind"))
    except ValueError:
        kind = ExitKind.ALL_KILLED
    code = end.get("code")
    return LastExit(at, code if type(code) is int and 0 <= code < 256 else CODE_OF_A_KILL, kind)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return 0.0
    return float(value)
