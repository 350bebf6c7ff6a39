"""Finds every process below one of ours, and ends them all: leaders first, resource trackers last."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from dynamo_worker.supervisor import interpreter, ledger, linux, mark
from dynamo_worker.supervisor.linux import Process, Stat
from dynamo_worker.supervisor.protocol import RUN_DIR

#: How long the resource trackers of ``multiprocessing`` may take to unlink what their dead clients left.
TRACKER_LIMIT = 1.0

#: Longest pause between two scans while processes are dying (normally SIGCHLD ends it sooner).
_SCAN_INTERVAL = 0.05

#: Scans in which everything should stand still.
_FREEZE_SCANS = 5

#: Scans after which whole process groups are killed as well: what survives that many forks faster than we look.
_PATIENT_SCANS = 10

#: The tree is recorded again after so many seconds: soon while it changes, later when it does not. A look at it takes
#: at most one part in ``_SHARE`` of the time.
_PAUSE, _LONGEST_PAUSE = 1.0, 16.0
_SHARE = 500.0

_TRACKER = b"from multiprocessing.resource_tracker import main"

#: Waits up to so many seconds for something to happen (a signal, a message, or input on a descriptor).
Wait = Callable[[float, int | None], None]


def descendants(root: int, excluded: Collection[Process] = ()) -> dict[Process, Stat]:
    """Return all processes below ``root``, parents before children, without the excluded ones and theirs."""
    return _below([root], _children(), excluded)


def left_of(run_dir: str, mark_of_tree: int, recorded: Collection[Process], supervisor: int = 0) -> dict[Process, Stat]:
    """Return all processes of a tree whose owners are dead, without us and our ancestors.

    A process belongs to it if it bears the tree's mark, was started with its run directory in the environment, was
    recorded, or descends from such a one.

    :param mark_of_tree: see ``mark``; 0 if unknown.
    :param recorded: processes that the guardian has recorded; only if their pids are of our pid namespace.
    :param supervisor: pid of the supervisor that wants to know. None of its own tree belongs to the dead one, even if
        it was started from there and has inherited everything.
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
        and not stat.ended  # dead already, and for its new parent to reap
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
    """Return what the kernel shows of a process' environment; every entry is between two zeros."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0" + file.read()
    except OSError:
        return b""


def is_resource_tracker(pid: int) -> bool:
    """Return whether a process is a resource tracker of ``multiprocessing``.

    It ends by itself when its last client is gone, and unlinks what they left: it must not be killed before.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            arguments = file.read(4096).split(b"\0")
    except OSError:
        return False
    return any(interpreter.own_code(argument).startswith(_TRACKER) for argument in arguments[1:])


def describe(process: Process) -> str:
    """Return one process in words for the log, with what it hangs in when the kernel says so."""
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
    """Keeps the record of our tree's processes up to date, for the next start, should both owners be killed at once.

    :param tree: returns the processes of our tree.
    """

    def __init__(self, run_dir: ledger.RunDir, tree: Callable[[], Iterable[Process]]) -> None:
        self._run_dir = run_dir
        self._tree = tree
        self._recorded: set[Process] = set()
        self._pause = _PAUSE
        #: When ``update`` should be called next (monotonic).
        self.due = time.monotonic() + _PAUSE

    def update(self) -> None:
        """Record the tree as it is."""
        started = time.monotonic()
        changed = False
        with contextlib.suppress(OSError):  # disk full, or no descriptor left? The marks of the processes have to do
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

    :param find: returns the processes that are left.
    :param reap: reaps our own children; returns True when there is not one left, dead or alive.
    :param wait: waits for the next thing to happen.
    :param spare_trackers: whether resource trackers are left to end by themselves, for a while.
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
        #: Every process that was sent SIGKILL, and every tracker seen, by name.
        self.seen: dict[Process, str] = {}

    def freeze(self) -> list[int]:
        """Stop everything but the resource trackers, so that it holds still to be looked at; return the pids."""
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

        :param deadline: the current deadline on the monotonic clock; it may move while this runs.
        :returns: what could not be killed.
        """
        scans = 0
        empty_scans = 0
        trackers_until: float | None = None
        while not self._reap():
            # Who has ended waits for a parent that does not reap it: because it hangs itself, or was left out.
            found = {process: stat for process, stat in self._find().items() if not stat.ended}
            scans += 1
            if not found:
                # A parent that died during the scan hides its children from it, once. Look twice.
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
    """Kill a whole process group, atomically against forks. Never our own."""
    if group > 1 and group != os.getpgrp():
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
