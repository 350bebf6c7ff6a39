"""Finds every process below one of ours, and ends them all, resource trackers last."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from dynamo_worker.supervisor import interpreter, ledger, linux, mark
from dynamo_worker.supervisor.linux import Process, Stat
from dynamo_worker.supervisor.protocol import RUN_DIR

#: Seconds for the resource trackers of ``multiprocessing`` to unlink what their dead clients left.
TRACKER_LIMIT = 1.0

#: Seconds between two scans while processes are dying (SIGCHLD normally ends the pause sooner).
_SCAN_INTERVAL = 0.05

#: Scans within which everything should be stopped.
_FREEZE_SCANS = 5

#: Scans after which whole process groups are killed too: survivors fork faster than we look.
_PATIENT_SCANS = 10

#: Seconds until the tree is recorded again: the least while it changes, the most when it does not. Scans take at most
#: one part in ``_SHARE`` of the time.
_PAUSE, _LONGEST_PAUSE = 1.0, 16.0
_SHARE = 500.0

#: Names of the programs that compile kernels, as the kernel shows them. Compilers that run inside an engine's process,
#: such as Triton's, show up as its CPU time.
COMPILERS = frozenset(
    {
        *("nvcc", "cicc", "cudafe++", "ptxas", "ptxas-blackwell", "fatbinary", "nvlink", "tileiras"),
        *("hipcc", "hipcc.bin", "amdclang", "amdclang++", "ninja", "make", "cmake", "cc", "c++", "gcc", "g++"),
        *("cc1", "cc1plus", "as", "ld", "ld.lld", "lld", "collect2", "lto1", "clang", "clang++"),
    }
)

_TRACKER = b"from multiprocessing.resource_tracker import main"

#: Waits a number of seconds at most for an event: a signal, a message, or input on a descriptor.
Wait = Callable[[float, int | None], None]


def descendants(root: int, excluded: Collection[Process] = ()) -> dict[Process, Stat]:
    """Return all processes below ``root``, parents before children, except the excluded ones and theirs."""
    return _below([root], _children(), excluded)


def left_of(run_dir: str, mark_of_tree: int, recorded: Collection[Process], supervisor: int = 0) -> dict[Process, Stat]:
    """Return all processes of a tree whose owners are dead, except us and our ancestors.

    A process belongs to the tree if it has the tree's mark, was started with the run directory in its environment, was
    recorded, or descends from such a process.

    :param mark_of_tree: see ``mark``; 0 if unknown.
    :param recorded: processes that the guardian recorded, if their pids belong to our pid namespace.
    :param supervisor: pid of the supervisor that asks. Its own tree is excluded, even if it was started from the dead
        tree and inherited everything.
    """
    entry = f"\0{RUN_DIR}=".encode() + os.fsencode(run_dir) + b"\0"
    children = _children()
    stats = {process: stat for siblings in children.values() for process, stat in siblings}
    parents = {process.pid: stat.parent for process, stat in stats.items()}
    ourselves = {os.getpid()}
    ancestor = os.getppid()
    while ancestor > 0 and ancestor not in ourselves:
        ourselves.add(ancestor)
        ancestor = parents.get(ancestor, 0)
    ourselves.update(process.pid for process in _below([supervisor] if supervisor else [], dict(children), ()))
    excluded = [process for process in stats if process.pid in ourselves]
    known = frozenset(recorded)
    found = {
        process: stat
        for process, stat in stats.items()
        if process.pid not in ourselves
        and not stat.ended  # already dead, for its new parent to reap
        and (
            process in known
            or (mark_of_tree and mark.of(process.pid) == mark_of_tree)
            or entry in _environment(process.pid)
        )
    }
    below = _below([process.pid for process in found], children, excluded)
    return found | {process: stat for process, stat in below.items() if not stat.ended}


def _children() -> dict[int, list[tuple[Process, Stat]]]:
    """Return all visible processes by the pid of their parent."""
    children: dict[int, list[tuple[Process, Stat]]] = {}
    for pid in linux.all_pids():
        stat = linux.read_stat(pid)
        if stat is not None:
            children.setdefault(stat.parent, []).append((Process(pid, stat.start), stat))
    return children


def _below(
    pending: list[int], children: dict[int, list[tuple[Process, Stat]]], excluded: Collection[Process]
) -> dict[Process, Stat]:
    """Return all processes below the given pids, parents before children; takes from ``children``."""
    found: dict[Process, Stat] = {}
    while pending:
        for process, stat in children.pop(pending.pop(), ()):
            if process not in excluded:
                found[process] = stat
                pending.append(process.pid)
    return found


def _environment(pid: int) -> bytes:
    """Return a process' environment as the kernel shows it, each entry between two zero bytes."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0" + file.read()
    except OSError:
        return b""


def is_resource_tracker(pid: int) -> bool:
    """Return whether a process is a resource tracker of ``multiprocessing``.

    A tracker ends when its last client is gone, and then unlinks what the clients left. It must not be killed earlier.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            arguments = file.read(4096).split(b"\0")
    except OSError:
        return False
    return any(interpreter.own_code(argument).startswith(_TRACKER) for argument in arguments[1:])


def describe(process: Process) -> str:
    """Describe a process for the log, including the kernel function it waits in, if known."""
    stat = linux.read_stat(process.pid)
    if stat is None:
        return str(process.pid)
    try:
        with open(f"/proc/{process.pid}/wchan", encoding="utf-8") as file:
            channel = file.read(64)
    except OSError:
        channel = ""
    where = f" in {channel}" if channel not in ("", "0") else ""
    return f"{process.pid} ({stat.name}, state {stat.state}{where})"


class TreeRecord:
    """Keeps the record of our tree's processes up to date, for a next start after both owners were killed at once.

    :param tree: returns the processes of our tree.
    """

    def __init__(self, run_dir: ledger.RunDir, tree: Callable[[], Iterable[Process]]) -> None:
        self._run_dir = run_dir
        self._tree = tree
        self._recorded: set[Process] = set()
        self._pause = _PAUSE
        #: When ``update`` is due (monotonic).
        self.due = time.monotonic() + _PAUSE

    def update(self) -> None:
        """Record the current tree."""
        started = time.monotonic()
        changed = False
        with contextlib.suppress(OSError):  # disk full or out of descriptors: the marks have to do
            processes = set(self._tree())
            changed = processes != self._recorded
            if changed:
                ledger.write_processes(self._run_dir, processes)
                self._recorded = processes
        now = time.monotonic()
        self._pause = _PAUSE if changed else min(2 * self._pause, _LONGEST_PAUSE)
        self.due = now + max(self._pause, _SHARE * (now - started))


class Killing:
    """Ends a set of processes that may still be forking.

    :param find: returns the remaining processes.
    :param reap: reaps our own children; returns True when none is left, dead or alive.
    :param wait: waits for the next event.
    :param spare_trackers: whether resource trackers get a moment to end by themselves.
    """

    def __init__(
        self,
        find: Callable[[], Mapping[Process, Stat]],
        reap: Callable[[], bool],
        wait: Wait,
        *,
        spare_trackers: bool = True,
    ) -> None:
        self._find = find
        self._spare_trackers = spare_trackers
        self._reap = reap
        self._wait = wait
        #: Names of all processes that were sent SIGKILL, and of all trackers seen.
        self.seen: dict[Process, str] = {}

    def freeze(self) -> list[int]:
        """Stop everything except resource trackers, so it can be inspected; return the pids."""
        frozen: set[Process] = set()
        for _ in range(_FREEZE_SCANS):
            new = [process for process in self._find() if process not in frozen]
            if not new:
                break
            for process in new:
                if not is_resource_tracker(process.pid):
                    linux.send_signal(process, signal.SIGSTOP)
            frozen.update(new)
        return [process.pid for process in frozen]

    def run(self, deadline: Callable[[], float]) -> list[Process]:
        """Kill until none is left or the deadline has passed.

        :param deadline: returns the current deadline (monotonic); may change while this runs.
        :return: what could not be killed.
        """
        scans = 0
        empty_scans = 0
        trackers_until: float | None = None
        while not self._reap():
            # A process that has ended but is not reaped has a parent that hangs, or that was excluded.
            found = {process: stat for process, stat in self._find().items() if not stat.ended}
            scans += 1
            if not found:
                # A parent that dies during a scan hides its children from that scan. Look twice.
                empty_scans += 1
                if empty_scans == 2:
                    break
                continue
            empty_scans = 0
            now = time.monotonic()
            trackers = [process for process in found if self._spare_trackers and is_resource_tracker(process.pid)]
            for process, stat in found.items():
                if process not in self.seen:
                    self.seen[process] = stat.name
                    if process in trackers and stat.state in "tT":
                        linux.send_signal(process, signal.SIGCONT)
                if process not in trackers:
                    linux.send_signal(process, signal.SIGKILL)
                    if scans > _PATIENT_SCANS:
                        _kill_group(stat.group)
            if len(trackers) == len(found) and trackers_until is None:
                trackers_until = now + TRACKER_LIMIT
            limit = min(deadline(), trackers_until if trackers_until is not None else deadline())
            if now >= min(limit, deadline() - 0.1):
                for process in trackers:
                    linux.send_signal(process, signal.SIGKILL)
            if now >= deadline():
                return list(found)
            self._wait(max(0.0, min(_SCAN_INTERVAL, limit - now)) or 0.01, None)
        return []


def _kill_group(group: int) -> None:
    """Kill a whole process group, which no fork escapes. Never our own."""
    if group > 1 and group != os.getpgrp():
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
