"""The processes that an engine has started below the worker: which there are, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import linux, process_tree

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline
    from dynamo_worker.supervisor.linux import Process

#: How ``multiprocessing`` and :mod:`dynamo_worker.kit.preload` start processes. Engines' processes look like this
#: before they name themselves.
_SPAWNED = (b"multiprocessing.spawn", b"dynamo_worker.kit.preload")
#: Seconds that leaders have to end once those below them are dead: they still unlink what they share.
_LEADERS_SECONDS = 0.3
_POLL_SECONDS = 0.01


def named(title: bytes) -> list[int]:
    """Return the processes below this one whose command line begins with ``title``: those that named themselves.

    Helpers that come and go have no such name: resource trackers, compilers.
    """
    return [process.pid for process in process_tree.descendants(os.getpid()) if _command(process).startswith(title)]


class EngineProcesses:
    """Everything below this process that an engine has started, as it is now.

    Left out are the trackers of shared memory: they remove it once everybody else is gone, and end by themselves.
    """

    def __init__(self, title: bytes) -> None:
        """Look at the processes there are.

        :param title: how the command lines of the engine's processes begin.
        """
        tree = process_tree.descendants(os.getpid())
        self._leaders: list[Process] = []
        self._below: list[Process] = []
        belonging: set[int] = set()
        for process, stat in tree.items():  # parents come before their children
            if stat.parent == os.getpid():
                command = _command(process)
                if command.startswith(title) or any(mark in command for mark in _SPAWNED):
                    self._leaders.append(process)
                    belonging.add(process.pid)
            elif stat.parent in belonging:
                belonging.add(process.pid)
                if not process_tree.is_resource_tracker(process.pid):
                    self._below.append(process)

    def signal_leaders(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Make those that this process has started end; they end the others, or the kernel does."""
        for process in self._leaders:
            linux.send_signal(process, number)

    async def end(self, patience: float, deadline: Deadline) -> None:
        """Wait until all have ended; kill those that have not in time.

        First those below are killed: their leaders wait for nothing else, and still remove what they share.

        :param patience: seconds they have to end by themselves.
        """
        for process in self._leaders + self._below:
            linux.send_signal(process, signal.SIGCONT)  # a stopped process hears nothing else
        await self._gone(deadline.within(patience))
        for processes in (self._below, self._leaders + self._below):
            for process in processes:
                if linux.is_alive(process):
                    linux.send_signal(process, signal.SIGKILL)
            await self._gone(deadline.within(_LEADERS_SECONDS))

    async def _gone(self, deadline: Deadline) -> None:
        while any(map(linux.is_alive, self._leaders + self._below)) and not deadline.passed:
            await asyncio.sleep(_POLL_SECONDS)


def _command(process: Process) -> bytes:
    try:
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""
