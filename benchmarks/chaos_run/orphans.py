"""Processes whose parents were killed: adopted, so that their CPU time counts, and reaped."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

from common.processes import children, is_alive

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds after which nobody else reaps an ended process any more, and between two looks.
_PATIENCE: Final = 5.0
_INTERVAL: Final = 2.0


class Orphans:
    """Reaps the ended children of this process that nobody waits for.

    :param known: returns the pids of children that somebody waits for.
    """

    def __init__(self, known: Callable[[], set[int]]) -> None:
        self._known = known
        self._ended: dict[int, float] = {}
        self._next = 0.0

    def reap(self) -> None:
        """Reap those that have been ended for some time: one that was just started may not be known yet."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _INTERVAL
        known = self._known()
        ended = {pid for pid in children(os.getpid()) if pid not in known and not is_alive(pid)}
        self._ended = {pid: self._ended.get(pid, now) for pid in ended}
        for pid, since in self._ended.items():
            if now - since > _PATIENCE:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
