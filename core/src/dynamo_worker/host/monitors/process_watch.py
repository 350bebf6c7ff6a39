"""Watches processes without polling: the kernel reports a death through a pidfd within a millisecond."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from dynamo_worker.errors import EngineDeadError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class ProcessWatch:
    """Reports the death of processes. Its methods require a running event loop."""

    def __init__(self, on_fatal: Callable[[WorkerError], None]) -> None:
        self._on_fatal = on_fatal
        self._watched: set[int] = set()

    def watch(self, pids: Iterable[int], what: str, error: type[WorkerError] = EngineDeadError) -> None:
        """Watch ``pids``; the death of one is fatal.

        :param what: the kind of process, for the message ("engine process").
        :param error: the error that their death is reported as.
        """
        loop = asyncio.get_running_loop()
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._on_fatal(error(f"{what} {pid} is dead"))
                continue
            self._watched.add(pidfd)
            loop.add_reader(pidfd, self._died, pidfd, f"{what} {pid} ({_command_name(pid)})", error)

    def close(self) -> None:
        """Stop watching: the processes are about to be ended on purpose."""
        for pidfd in list(self._watched):
            self._forget(pidfd)

    def _forget(self, pidfd: int) -> None:
        self._watched.discard(pidfd)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    def _died(self, pidfd: int, what: str, error: type[WorkerError]) -> None:
        how = _how_it_died(pidfd)
        self._forget(pidfd)
        self._on_fatal(error(f"{what} died{how}"))


def _command_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "already gone"


def _how_it_died(pidfd: int) -> str:
    """Describe how a child of this process died, without reaping it: its owner does."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return ""
    if result is None:
        return ""
    if result.si_code == os.CLD_EXITED:
        return f": exit code {result.si_status}"
    try:
        return f": killed by {signal.Signals(result.si_status).name}"
    except ValueError:  # most real-time signals have no name
        return f": killed by signal {result.si_status}"
