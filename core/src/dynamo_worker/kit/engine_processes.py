"""The processes that an engine has started below the worker: finding them and ending them."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dynamo_worker.supervisor import linux, process_tree

if TYPE_CHECKING:
    import re
    from collections.abc import Awaitable, Callable, Collection, Iterable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.supervisor.linux import Process

_T = TypeVar("_T")

#: Found in the command lines of processes that ``multiprocessing`` and :mod:`dynamo_worker.kit.preload` start, until
#: those set their own titles.
_SPAWNED = (b"multiprocessing.spawn", b"dynamo_worker.kit.preload")
#: Found in the command lines of processes that engines can do without: fork servers, those in which torch compiles, and
#: the worker's own decoders of images.
_HELPERS = (b"multiprocessing.forkserver", b"compile_worker", b"dynamo_worker.kit.media_decoder_main")
#: Seconds after which a process that still runs is more than a short question.
_LASTING_SECONDS = 0.5
#: Seconds that leaders get once the processes below them are dead: they still unlink shared memory.
_LEADERS_SECONDS = 0.3
_POLL_SECONDS = 0.01
#: Seconds between two looks at processes, and until whoever waits for them must have said why one died.
_WATCH_SECONDS, _REPORT_SECONDS = 0.25, 2.0


def named(title: bytes) -> list[int]:
    """Return the pids of the processes below this one whose command line begins with ``title``.

    Short-lived helpers such as resource trackers and compilers have no such title.
    """
    return [process.pid for process in process_tree.descendants(os.getpid()) if _command(process).startswith(title)]


class StartedSince:
    """The processes that appear below this one from now on, for an engine that does not tell which are its own.

    Those that only help are left out: trackers of shared memory, fork servers, and compilers.
    """

    def __init__(self) -> None:
        """Take note of those that are there already."""
        self._before = frozenset(process_tree.descendants(os.getpid()))

    def found(self, pattern: re.Pattern[str] | None = None) -> list[Process]:
        """Return those that run now, parents before their children.

        :param pattern: found in the command lines of those that count; None for all.
        """
        return [
            process
            for process, stat in process_tree.descendants(os.getpid()).items()
            if process not in self._before and not stat.ended and _counts(process, stat.name, pattern)
        ]

    async def lasting(self, pattern: re.Pattern[str] | None = None) -> list[Process]:
        """Return those that run now and still do after half a second: an engine asks many a program something."""
        first = self.found(pattern)
        if not first:
            return []
        await asyncio.sleep(_LASTING_SECONDS)
        return [process for process in first if linux.is_alive(process)]


def _counts(process: Process, name: str, pattern: re.Pattern[str] | None) -> bool:
    command = _command(process)
    if pattern is not None:
        return pattern.search(command.replace(b"\0", b" ").decode(errors="replace")) is not None
    helps = any(mark in command for mark in _HELPERS)
    return not helps and name not in process_tree.COMPILERS and not process_tree.is_resource_tracker(process.pid)


class Launched(NamedTuple):
    """Processes that a launcher has started for an engine, such as the ranks below Open MPI's ``orted``.

    :param launchers: children of this process.
    :param children: the launchers' children: the engine's own processes.
    :param helpers: everything below those.
    """

    launchers: list[Process]
    children: list[Process]
    helpers: list[Process]

    @classmethod
    def by(cls, launcher: str) -> Launched:
        """Return what the launchers with a name have started: their children's command lines may vary.

        :param launcher: the name in the process table.
        """
        tree = process_tree.descendants(os.getpid())
        launchers = [one for one, stat in tree.items() if stat.name == launcher and stat.parent == os.getpid()]
        pids = {process.pid for process in launchers}
        children = [one for one, stat in tree.items() if stat.parent in pids]
        belonging, helpers = {process.pid for process in children}, []
        for process, stat in tree.items():  # parents come before their children
            if stat.parent in belonging:
                belonging.add(process.pid)
                helpers.append(process)
        return cls(launchers, children, helpers)


def dead(processes: Iterable[Process]) -> list[int]:
    """Return the pids of those processes that have ended."""
    return [process.pid for process in processes if not linux.is_alive(process)]


async def while_alive(work: Awaitable[_T], find: Callable[[], Iterable[Process]]) -> _T:
    """Return the result of ``work``, which may wait for ever for a process that has died.

    :param find: returns the processes; called again and again, because they appear one by one.
    :raises ChildProcessError: a process has died, and ``work`` does not end.
    """
    task = asyncio.ensure_future(work)
    seen: list[Process] = []
    while not task.done():
        await asyncio.wait({task}, timeout=_WATCH_SECONDS)
        gone = dead(seen)
        if gone:
            await asyncio.wait({task}, timeout=_REPORT_SECONDS)  # it may know why
            if not task.done():
                raise ChildProcessError(f"a process of the engine has died (pid {gone[0]})")
        seen = list(find())
    return task.result()


async def kill(processes: Iterable[Process], deadline: Deadline) -> None:
    """Kill processes, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        linux.send_signal(process, signal.SIGKILL)
    while any(map(linux.is_alive, processes)) and not deadline.passed:
        await asyncio.sleep(_POLL_SECONDS)


async def end(title: bytes, number: signal.Signals, patience: float, deadline: Deadline) -> None:
    """Signal an engine's leading processes, wait, and kill what is left.

    :param title: how the command lines of the engine's processes begin.
    :param patience: seconds until the first are killed.
    """
    tree = EngineProcesses(title)
    tree.signal_leaders(number)
    await tree.end(patience, deadline)


class EngineProcesses:
    """A snapshot of the processes that an engine has started below this one.

    Leaders are children of this process. The trackers of shared memory are left out: they remove it once all others
    are gone, and then end by themselves.
    """

    def __init__(self, title: bytes, leaders: Collection[int] = ()) -> None:
        """Take the snapshot.

        :param title: how the command lines of the engine's processes begin.
        :param leaders: pids of the leaders, for an engine whose processes have any title; ``title`` is then ignored.
        """
        tree = process_tree.descendants(os.getpid())
        self._leaders: list[Process] = []
        self._below: list[Process] = []
        belonging: set[int] = set()
        for process, stat in tree.items():  # parents come before their children
            if stat.parent == os.getpid():
                if process.pid in leaders or (not leaders and self._is_titled(process, title)):
                    self._leaders.append(process)
                    belonging.add(process.pid)
            elif stat.parent in belonging:
                belonging.add(process.pid)
                if not process_tree.is_resource_tracker(process.pid):
                    self._below.append(process)

    @property
    def pids(self) -> list[int]:
        """The pids of the leaders and of everything below them."""
        return [process.pid for process in self._leaders + self._below]

    @staticmethod
    def _is_titled(process: Process, title: bytes) -> bool:
        command = _command(process)
        return command.startswith(title) or any(mark in command for mark in _SPAWNED)

    def signal_leaders(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the leaders; they, or the kernel, end the processes below them."""
        for process in self._leaders:
            linux.send_signal(process, number)

    async def end(self, patience: float, deadline: Deadline) -> None:
        """Wait until all have ended, and kill those that do not end in time.

        Those below are killed first: their leaders then stop waiting for them and remove the shared memory.

        :param patience: seconds they get to end by themselves.
        """
        for process in self._leaders + self._below:
            linux.send_signal(process, signal.SIGCONT)  # a stopped process handles no other signal
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
