"""Flight records on disk: one file of JSON lines for each worker, of bounded size, in a directory that keeps the last.

A file is written as the worker lives, so it is there whatever ends the worker. Its beginning and its end are kept, and
what lies between is dropped when it gets too long. Whoever writes it holds a lock on it: a record without a lock is
over. Nothing here trusts a file or directory that another user may have prepared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.files import open_regular
from dynamo_worker.supervisor.safe_place import make_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of the format, which every record names in its first line.
FORMAT: Final = 1

#: Bytes of a record: in all, of its beginning that is always kept, and of its end that is kept when it gets too long.
MOST_BYTES: Final = 192 * 1024
KEPT_BEGINNING: Final = 32 * 1024
KEPT_END: Final = 96 * 1024

#: Bytes of one line.
_MOST_LINE: Final = 4096

#: Seconds after which a file that was to replace a record is a leftover.
_SETTLED: Final = 60.0

_NAME: Final = re.compile(r"dw-\d{8}T\d{6}\.\d{6}Z-\d+-[0-9a-f]{6}\.jsonl")
_REPLACEMENT: Final = "~"

#: File systems that may hang: a write there would keep the supervisor from its deadlines.
_REMOTE: Final = re.compile(r"nfs|cifs|smb|ceph|lustre|gpfs|beegfs|afs|fuse|glusterfs|pvfs|orangefs|ocfs")


def default_directory(environ: Mapping[str, str]) -> str | None:
    """Return where records are kept unless a directory is chosen: among the user's state; None without a home."""
    state = environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "dynamo-worker", "records") if os.path.isabs(state) else None


def open_directory(path: str, *, create: bool = False, write: bool = False) -> int:
    """Open a directory of records and return its descriptor.

    :param create: create it and what is missing above it, for this user only.
    :param write: records are to be written: not even root does that in the directory of another user.
    :raises OSError: it is missing, a link, another user's, or on a file system that may hang.
    """
    # A slash at the end would follow a link.
    path = os.path.abspath(path)
    if create and not os.path.lexists(path):
        os.close(make_directory(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_directory(path, descriptor, write=write)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_directory(path: str, descriptor: int, *, write: bool) -> None:
    status = os.fstat(descriptor)
    trusted = status.st_uid in (0, os.geteuid(), linux.unmapped_user())
    if not trusted and (write or os.geteuid() != 0):
        raise PermissionError(errno.EPERM, f"belongs to another user ({status.st_uid})", path)
    kind = _file_system(status.st_dev)
    if _REMOTE.match(kind):
        raise OSError(errno.ENOTSUP, f"is on a file system that may hang ({kind}); use a local one", path)


def _file_system(device: int) -> str:
    """Return the type of a mounted file system; empty if it cannot be found."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError, ValueError), open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""


def names(directory: int) -> list[str]:
    """Return the names of all records in a directory, the oldest first."""
    return sorted(name for name in os.listdir(directory) if _NAME.fullmatch(name))


def open_record(directory: int, name: str, flags: int = os.O_RDONLY) -> int:
    """Open a record and return its descriptor.

    :param directory: descriptor of the directory.
    :raises OSError: it is missing, no regular file, has a second name, or another user may have written it.
    """
    descriptor = open_regular(name, flags | os.O_NOFOLLOW, dir_fd=directory)
    status = os.fstat(descriptor)
    ours = {os.geteuid()}
    if os.geteuid() == 0 and flags == os.O_RDONLY:
        ours.add(os.fstat(directory).st_uid)
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid not in ours or writable or status.st_nlink != 1:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "another user may have written it", name)
    return descriptor


def is_locked(descriptor: int) -> bool:
    """Return whether the process that writes a record lives."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def by_life(directory: int) -> tuple[list[str], list[str]]:
    """Return the records of workers that are over, by the time of their ends, and of those that run, by their starts.

    Records that another user may have written are left out.

    :raises OSError: the directory cannot be read.
    """
    over: list[tuple[float, str]] = []
    running: list[str] = []
    for name in names(directory):
        with contextlib.suppress(OSError):  # pruned in this moment
            descriptor = open_record(directory, name)
            try:
                if is_locked(descriptor):
                    running.append(name)
                else:
                    over.append((os.fstat(descriptor).st_mtime, name))
            finally:
                os.close(descriptor)
    return [name for _, name in sorted(over)], running


def read(descriptor: int, most: int = 2 * MOST_BYTES) -> bytes:
    """Return what a record contains, or as many bytes of it."""
    pieces = []
    offset = 0
    while offset < most and (piece := os.pread(descriptor, most - offset, offset)):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def entries(data: bytes) -> list[dict[str, Any]]:
    """Return the entries of a record. Lines that are cut off are left out: a writer may have been killed."""
    found = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("event"), str):
                found.append(entry)
    return found


class RecordFile:
    """One record that this process writes.

    :param directory: descriptor of its directory, which this object closes.
    :param descriptor: its own.
    """

    def __init__(self, directory: int, name: str, descriptor: int) -> None:
        self._directory = directory
        self._descriptor = descriptor
        self.name = name
        self._size = os.fstat(descriptor).st_size
        #: Whether the last line may be incomplete.
        self._torn = False

    @classmethod
    def create(cls, path: str, keep: int) -> RecordFile:
        """Create a record, and remove the oldest ones that are over.

        :param path: the directory, which is created if it is missing.
        :param keep: how many records to keep, with this one.
        :raises OSError: the directory or the record cannot be used.
        """
        directory = open_directory(path, create=True, write=True)
        try:
            now = time.time()
            stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now * 1e6) % 1_000_000:06d}Z"
            name = f"dw-{stamp}-{os.getpid()}-{os.urandom(3).hex()}.jsonl"
            record = cls(directory, name, _create(directory, name))
        except OSError:
            os.close(directory)
            raise
        _prune(directory, keep)
        return record

    @classmethod
    def reopen(cls, path: str, name: str) -> RecordFile:
        """Open a record whose writers are dead, to complete it.

        :raises OSError: it cannot be used.
        """
        if not _NAME.fullmatch(name):
            raise FileNotFoundError(errno.ENOENT, "No record has this name", name)
        directory = open_directory(path, write=True)
        try:
            return cls(directory, name, open_record(directory, name, os.O_RDWR | os.O_APPEND))
        except OSError:
            os.close(directory)
            raise

    def take_over(self) -> None:
        """Continue to write after the process that created it has died, and perhaps replaced the file.

        :raises OSError: the file is gone.
        """
        descriptor = open_record(self._directory, self.name, os.O_RDWR | os.O_APPEND)
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        _lock(descriptor)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry at the end.

        :raises OSError: the disk is full, for example. A later entry may succeed.
        """
        line = json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        if len(line) > _MOST_LINE:
            rest = {key: value for key, value in entry.items() if not isinstance(value, (str, list, dict))}
            line = json.dumps({**rest, "event": entry.get("event"), "cut": True}).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        self._torn = True
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False
        self._size += len(line)
        if self._size > MOST_BYTES:
            self._shorten()

    def _shorten(self) -> None:
        """Replace the file by one without its middle."""
        data = read(self._descriptor)
        beginning = data[: data.rfind(b"\n", 0, KEPT_BEGINNING) + 1]
        end = data[data.find(b"\n", len(data) - KEPT_END) + 1 :]
        middle = data[len(beginning) : len(data) - len(end)]
        earlier = [gap for gap in entries(middle) if gap["event"] == "gap"]
        dropped = middle.count(b"\n") - len(earlier) + sum(_number(gap.get("lines")) for gap in earlier)
        gap = json.dumps({"event": "gap", "lines": dropped}, separators=(",", ":")).encode() + b"\n"
        try:
            descriptor = self._replace(whole := beginning + gap + end)
        except OSError:
            # Bounded all the same: what is left of the old file loses its end instead of its middle.
            os.ftruncate(self._descriptor, len(beginning))
            self._size = len(beginning)
            raise
        os.close(self._descriptor)
        self._descriptor, self._size = descriptor, len(whole)

    def _replace(self, whole: bytes) -> int:
        """Put a new file in the place of the old one, at once, and return its descriptor."""
        replacement = self.name + _REPLACEMENT
        with contextlib.suppress(FileNotFoundError):
            os.unlink(replacement, dir_fd=self._directory)
        descriptor = _create(self._directory, replacement)
        try:
            if os.write(descriptor, whole) != len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(replacement, self.name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(replacement, dir_fd=self._directory)
            raise
        return descriptor

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries so far.

        :raises OSError: they cannot be read.
        """
        return entries(read(self._descriptor))

    def close(self) -> None:
        """Release the record: it is over unless another process holds its lock, too."""
        os.close(self._descriptor)
        os.close(self._directory)


def _create(directory: int, name: str) -> int:
    """Create a file for this user only, locked, and return its descriptor."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    os.fchmod(descriptor, 0o600)  # whatever the umask
    _lock(descriptor)
    return descriptor


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _prune(directory: int, keep: int) -> None:
    """Remove the oldest records that are over, and what a killed writer has left."""
    with contextlib.suppress(OSError):
        found = names(directory)
        for name in found[: max(0, len(found) - keep)]:
            with contextlib.suppress(OSError):
                descriptor = open_record(directory, name)
                try:
                    if not is_locked(descriptor):
                        os.unlink(name, dir_fd=directory)
                finally:
                    os.close(descriptor)
        for name in os.listdir(directory):
            if _NAME.fullmatch(name.removesuffix(_REPLACEMENT)) and name.endswith(_REPLACEMENT):
                with contextlib.suppress(OSError):
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _SETTLED:
                        os.unlink(name, dir_fd=directory)


def _number(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 53 else 0
