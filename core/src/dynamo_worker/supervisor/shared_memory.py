"""Tracks which ``/dev/shm`` segments belong to our tree, and removes those that outlive it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import ledger, linux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Where POSIX shared memory lives on Linux.
DIRECTORY = "/dev/shm"  # noqa: S108 -- this is the place itself

#: Lookups may take one part in ``_SHARE`` of the time, plus ``_CREDIT`` seconds. Within that budget a new segment is
#: looked up at once, else when the budget allows it, but after ``_LONGEST_PAUSE`` seconds at most.
_SHARE = 20.0
_CREDIT = 0.2
_LONGEST_PAUSE = 2.0

#: Seconds until a second lookup: the creator may not have mapped the segment at the first one.
_PAUSE = 0.1

#: A segment closed by its last user this many seconds before the worker is seen dead was closed by that death.
_DYING = 0.25


def segments_of(pid: int) -> set[int]:
    """Return the inodes of the shared-memory segments that a process maps or holds open.

    Inodes, because a semaphore is mapped under its temporary name. Only those of our own ``/dev/shm``: containers whose
    processes we see have theirs, with the same small numbers.
    """
    inodes: set[int] = set()
    prefix = os.fsencode(DIRECTORY) + b"/"
    try:
        device = os.stat(DIRECTORY).st_dev
    except OSError:
        return inodes
    mapped_device = b"%02x:%02x" % (os.major(device), os.minor(device))
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            if prefix in line:
                fields = line.split(None, 5)
                if fields[3] == mapped_device:
                    inodes.add(int(fields[4]))
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return inodes
    for descriptor in descriptors:
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            if os.readlink(path).startswith(DIRECTORY + "/"):
                status = os.stat(path)
                if status.st_dev == device:
                    inodes.add(status.st_ino)
        except OSError:
            continue
    return inodes


def in_use(pids: Iterable[int], since: float) -> dict[str, int]:
    """Return the segments that the given processes use, as inodes by name.

    :param since: seconds since the epoch; older segments are not ours.
    """
    inodes: set[int] = set()
    for pid in pids:
        inodes |= segments_of(pid)
    found: dict[str, int] = {}
    if inodes:
        with contextlib.suppress(OSError), os.scandir(DIRECTORY) as entries:
            for entry in entries:
                if entry.inode() in inodes and entry.stat(follow_symlinks=False).st_ctime >= since:
                    inode = _inode(entry.name)
                    if inode is not None:
                        found[entry.name] = inode
    return found


def remove_unused(segments: Iterable[tuple[str, int]]) -> list[str]:
    """Unlink those of the given segments that no process on this machine uses; return their names.

    A segment with a recorded name but another inode is a different one, and stays.
    """
    left = {name: inode for name, inode in segments if _inode(name) == inode}
    if not left:
        return []
    used: set[int] = set()
    for pid in linux.all_pids():
        used |= segments_of(pid)
    removed = []
    for name, inode in left.items():
        if inode not in used and _inode(name) == inode:
            try:
                os.unlink(os.path.join(DIRECTORY, name))
            except OSError:
                continue
            removed.append(name)
    return removed


class SegmentWatch:
    """Watches ``/dev/shm`` and records each new segment that a process of our tree uses.

    :param tree: returns the pids of our tree.
    """

    def __init__(self, run_dir: ledger.RunDir, tree: Callable[[], Iterable[int]]) -> None:
        self._run_dir = run_dir
        self._tree = tree
        self._lookups: dict[str, float | None] = {}  # new segments, and when they were first looked up
        self._closed: dict[str, float] = {}
        self._scanned = time.monotonic()
        self._credit = _CREDIT
        #: Recorded segments: inode by name.
        self.recorded: dict[str, int] = {}
        mask = linux.IN_CREATE | linux.IN_MOVED_TO | linux.IN_DELETE | linux.IN_MOVED_FROM | linux.IN_CLOSE_WRITE
        #: inotify descriptor; readable when there are events for ``read``.
        self.descriptor = linux.watch_directory(DIRECTORY, mask)

    def read(self) -> None:
        """Process events: what was created, closed and removed."""
        for mask, name in linux.read_events(self.descriptor):
            if mask & linux.IN_Q_OVERFLOW:
                with contextlib.suppress(
                    OSError
                ):  # out of descriptors: segments still in use at the end are found then
                    self._lookups.update(dict.fromkeys(set(os.listdir(DIRECTORY)) - set(self.recorded)))
            elif mask & linux.IN_CLOSE_WRITE:
                if name in self._lookups:
                    self._closed[name] = time.monotonic()
            elif mask & (linux.IN_CREATE | linux.IN_MOVED_TO):
                self._lookups[name] = None
            else:
                self._forget(name)
                self.recorded.pop(name, None)

    def due(self) -> float | None:
        """Return when ``look_up`` is due (monotonic), or None."""
        if not self._lookups:
            return None
        rested = self._scanned + min(max(0.0, -self._credit * _SHARE), _LONGEST_PAUSE)
        return max(rested, min(0.0 if first is None else first + _PAUSE for first in self._lookups.values()))

    def look_up(self) -> None:
        """Record which of the new segments our tree uses."""
        started = time.monotonic()
        wanted: dict[int, str] = {}
        for name in list(self._lookups):
            inode = _inode(name)
            if inode is None:  # removed, or not ours
                self._forget(name)
            else:
                wanted[inode] = name
        if wanted:
            found: set[int] = set()
            try:
                pids = list(self._tree())
            except OSError:  # out of descriptors: try again later
                self._scanned, self._credit = time.monotonic(), -_LONGEST_PAUSE / _SHARE
                return
            for pid in pids:
                found |= segments_of(pid) & wanted.keys()
                if len(found) == len(wanted):
                    break
            for inode, name in wanted.items():
                first = self._lookups[name]
                if inode in found:
                    self.recorded[name] = inode
                    self._forget(name)
                elif first is None:
                    self._lookups[name] = started
                elif started >= first + _PAUSE:
                    self._forget(name)
            if found:
                self._write()
        earned = (started - self._scanned) / _SHARE
        self._scanned = time.monotonic()
        self._credit = min(self._credit + earned, _CREDIT) - (self._scanned - started)

    def claim(self) -> None:
        """Record what the worker created and held until it died, right after its death.

        The dead have no maps to look at. So this takes segments that were created since the last lookups and closed by
        their last user at that moment, if only this user can open them, as libraries create them.
        """
        self.read()
        now, now_on_disk = time.monotonic(), time.time()
        claimed = {}
        for name, closed_at in self._closed.items():
            inode = _inode(name, since=now_on_disk - _LONGEST_PAUSE - _DYING, private=True)
            if inode is not None and now - closed_at <= _DYING:
                claimed[name] = inode
        self._closed.clear()
        if claimed:
            self.recorded.update(claimed)
            self._write()

    def _forget(self, name: str) -> None:
        """Stop looking up a segment."""
        self._lookups.pop(name, None)
        self._closed.pop(name, None)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # disk full: the copy in memory still serves this process
            ledger.write_segments(self._run_dir, self.recorded.items())

    def close(self) -> None:
        """Stop watching."""
        os.close(self.descriptor)


def _inode(name: str, since: float = 0.0, *, private: bool = False) -> int | None:
    """Return the inode of a segment that this user can own, or None.

    :param since: seconds since the epoch; older segments do not count.
    :param private: require that it belongs to this user and no other can open it.
    """
    if "/" in name:  # not a segment's name; a forged record must not lead elsewhere
        return None
    try:
        status = os.lstat(os.path.join(DIRECTORY, name))
    except (OSError, ValueError):  # a forged name may contain a zero byte
        return None
    if os.geteuid() not in (0, status.st_uid) or status.st_mode & 0o170000 != 0o100000 or status.st_ctime < since:
        return None
    if private and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        return None
    return status.st_ino
