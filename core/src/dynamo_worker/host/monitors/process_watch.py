"""Watches processes without polling: the kernel reports a death through a pidfd within a millisecond."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from dynamo_worker.errors import EngineDeadError, WorkerError
from dynamo_worker.supervisor.verdict import signal_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class ProcessWatch:
    """Reports the death of processes. Its methods require a running event loop."""

    def __init__(
        self, on_fatal: Callable[[WorkerError], None], on_death: Callable[[str, int, int | None], None] | None = None
    ) -> None:
        """Watch nothing yet.

        :param on_fatal: called with the error that a death is.
        :param on_death: called before that with what died, its pid and its exit code, which is negative for a signal
            and None if it is not known here.
        """
        self._on_fatal = on_fatal
        self._on_death = on_death
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
            loop.add_reader(pidfd, self._died, pidfd, pid, f"{what} {pid} ({_command_name(pid)})", error)

    def close(self) -> None:
        """Stop watching: the processes are about to be ended on purpose."""
        for pidfd in list(self._watched):
            self._forget(pidfd)

    def _forget(self, pidfd: int) -> None:
        self._watched.discard(pidfd)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    def _died(self, pidfd: int, pid: int, what: str, error: type[WorkerError]) -> None:
        code = _exit_code(pidfd)
        self._forget(pidfd)
        if self._on_death is not None:
            self._on_death(what, pid, code)
        self._on_fatal(error(f"{what} died{_how_it_died(code)}"))


def _command_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "already gone"


def _exit_code(pidfd: int) -> int | None:
    """Return the exit code of a child of this process, negative for a signal, without reaping it: its owner does."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _how_it_died(code: int | None) -> str:
    """Describe how a process died."""
    if code is None:
        return ""
    if code >= 0:
        return f": exit code {code}"
    return f": killed by {signal_name(-code)}"
