"""The processes of vLLM below this one: which there are, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_worker import Deadline

#: vLLM names its processes like this (``VLLM_PROCESS_NAME_PREFIX`` changes it).
_TITLE = os.environ.get("VLLM_PROCESS_NAME_PREFIX", "VLLM").encode() + b"::"

#: Seconds that leaders have to end once those below them are dead.
_LEADERS_SECONDS = 0.3


def _children() -> dict[int, list[int]]:
    """Return the children of every process."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(entry))
    return children


def _descendants(pid: int) -> list[int]:
    children = _children()
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _is_vllm(pid: int) -> bool:
    command = _command(pid)
    # Before it names itself, a process that multiprocessing has spawned looks like this.
    return command.startswith(_TITLE) or b"multiprocessing.spawn" in command


def serving() -> list[int]:
    """Return the processes below this one without which vLLM cannot serve: those that it has named.

    Helpers that come and go have no name: resource trackers, compilers.
    """
    return [pid for pid in _descendants(os.getpid()) if _command(pid).startswith(_TITLE)]


class Tree:
    """Everything below this process that vLLM has started, as it is now.

    Left out are the trackers of shared memory: they remove it once everybody else is gone, and end by themselves.
    """

    def __init__(self) -> None:
        self._leaders = [pid for pid in _children().get(os.getpid(), []) if _is_vllm(pid)]
        below = [pid for leader in self._leaders for pid in _descendants(leader)]
        self._below = [pid for pid in below if b"resource_tracker" not in _command(pid)]

    def signal_leaders(self) -> None:
        """Ask those that this process has started to end; they end the others."""
        for pid in self._leaders:
            _signal(pid, signal.SIGTERM)

    async def end(self, patience: float, deadline: Deadline) -> None:
        """Wait until all have ended; kill those that have not in time.

        First those below are killed: their leaders wait for nothing else, and still remove what they share.

        :param patience: seconds they have to end by themselves.
        """
        for pid in self._leaders + self._below:
            _signal(pid, signal.SIGCONT)  # a stopped process hears nothing else
        await self._gone(deadline.within(patience))
        for pids in (self._below, self._leaders + self._below):
            for pid in pids:
                if _running(pid):
                    _signal(pid, signal.SIGKILL)
            await self._gone(deadline.within(_LEADERS_SECONDS))

    async def _gone(self, deadline: Deadline) -> None:
        while any(map(_running, self._leaders + self._below)) and not deadline.passed:
            await asyncio.sleep(0.01)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and only waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
