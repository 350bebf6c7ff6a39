"""The worker's private directory: created before the worker, removed after it, or found again by the next start."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_worker.supervisor import linux, mark
from dynamo_worker.supervisor.files import open_regular
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.removal import remove_contents
from dynamo_worker.supervisor.safe_place import PLACE, make_safe, real_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PREFIX = "dw-"
#: Names that ``RunDirectory.create`` gives. Others with the same prefix are not ours.
_NAME = re.compile(r"dw-\d+-[0-9a-f]{6}")
_OWNER = "owner"
_UNFINISHED = _OWNER + "~"

#: Where temporary files go by default.
_USUAL_PLACES = ("/tmp", "/var/tmp", "/usr/tmp", ".")  # noqa: S108 -- mkdir with mode 0700 makes them safe

#: Bytes of the longest usable path. A unix socket's has 107, of which ``/dw-4194304-123abc/tmp`` and the socket's name
#: take their part: 36 for vLLM, 31 for ``multiprocessing``.
_LONGEST_PLACE = 107 - 22 - 37

#: A place with less room counts as full: the worker could not even record its registration.
_LEAST_BYTES, _LEAST_FILES = 1 << 20, 100

#: Seconds during which a directory without a readable owner may still be under construction.
_SETTLED = 60.0

#: The record has its full length from the start: overwriting it takes no space if the disk is full later.
_RECORD_BYTES = 4096

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Record(NamedTuple):
    """The content of ``owner``."""

    owners: list[Process]
    #: Where the pids are valid, see ``linux.pid_space``.
    pid_space: str
    #: Whether locks work on this file system: an unlocked directory then has dead owners.
    locks_hold: bool
    #: The mark of the tree's processes.
    mark: int
    #: Seconds since the epoch.
    made_at: float


class RunDirectory:
    """A directory that belongs to one supervisor and its guardian.

    Both hold a lock on ``owner`` through the same open file: one of them lives as long as it is locked. The lock works
    across pid namespaces, where pids cannot be compared. A second one, on the directory, keeps systemd-tmpfiles away.

    All access is by descriptor, never by path, which would lead elsewhere if a link took its place.

    :param base: descriptor of the parent directory.
    :param directory: descriptor of the directory itself.
    :param lock: descriptor of ``owner``.
    """

    def __init__(self, path: str, base: int, directory: int, lock: int, record: _Record) -> None:
        self.path = path
        self._base = base
        self._directory = directory
        self._lock = lock
        self._record = record
        #: Places that could not be used, or only after a change, and why.
        self.trouble: list[str] = []

    @classmethod
    def create(cls) -> RunDirectory:
        """Create ``dw-PID-RANDOM`` with ``tmp`` in it, where the ``tempfile`` module would.

        :raises OSError: no place is usable; the text says why for each.
        """
        problems: dict[str, OSError] = {}
        variables = map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))
        places = list(dict.fromkeys(place for place in (*variables, *_USUAL_PLACES) if place))
        # A path that is too long is better than none: not every engine uses sockets.
        for place, length_counts in [(place, True) for place in places] + [(place, False) for place in places]:
            try:
                created = cls._create_in(place, length_counts=length_counts)
                created.trouble[:0] = _in_words(problems)
                return created
            except OSError as error:  # noqa: PERF203 - each place has its own problem
                problems.setdefault(place, error)
        number = next(iter(problems.values())).errno
        raise OSError(number, f"{'; '.join(_in_words(problems))} (make room, or set TMPDIR to a place that has some)")

    @classmethod
    def _create_in(cls, place: str, *, length_counts: bool) -> RunDirectory:
        name = f"{_PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
        with contextlib.ExitStack() as undo:
            base = _opened(os.open(place, PLACE), undo)
            place = real_path(base)
            length = len(os.fsencode(place))
            if length_counts and length > _LONGEST_PLACE:
                words = f"too long for unix sockets in it ({length} bytes; {_LONGEST_PLACE} at most)"
                raise OSError(errno.ENAMETOOLONG, words)
            trouble = make_safe(place, base)
            os.mkdir(name, 0o700, dir_fd=base)
            undo.callback(_quietly, os.rmdir, name, base)
            directory = _opened(os.open(name, _FLAGS, dir_fd=base), undo)
            if not _is_private(directory):
                raise OSError(errno.EPERM, "a directory made there is not private to this user")
            _check_room(directory)
            os.mkdir("tmp", 0o700, dir_fd=directory)
            undo.callback(_quietly, os.rmdir, "tmp", directory)
            # `owner` has another name until it is locked and written, so no sweep looks at it earlier.
            lock = os.open(_UNFINISHED, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
            undo.callback(_quietly, os.unlink, _UNFINISHED, directory)
            _opened(lock, undo)
            locks_hold = _lock(lock) and _is_locked(directory)
            _lock(directory)
            status = linux.read_stat(os.getpid())
            owners = [Process(os.getpid(), status.start)] if status is not None else []
            record = _Record(owners, linux.pid_space(), locks_hold, mark.draw(), time.time())
            _write_record(lock, record)
            os.rename(_UNFINISHED, _OWNER, src_dir_fd=directory, dst_dir_fd=directory)
            undo.pop_all()
        created = cls(os.path.join(place, name), base, directory, lock, record)
        created.trouble = trouble
        return created

    @classmethod
    def take_over(cls, path: str) -> RunDirectory | None:
        """Lock and return a run directory whose owners are dead; None for any other directory."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            base = _opened(os.open(os.path.dirname(path), PLACE), undo)
            directory = _opened(os.open(os.path.basename(path), _FLAGS, dir_fd=base), undo)
            if not _is_private(directory):  # others may have forged its content
                return None
            try:
                lock = _opened(_open_owner(directory), undo)
            except FileNotFoundError:
                _remove_empty(os.path.basename(path), base, directory)
                return None
            record = _dead_record(lock)
            if record is None:
                return None
            _lock(directory)
            undo.pop_all()
            return cls(path, base, directory, lock, record)
        return None

    @property
    def descriptor(self) -> int:
        """The descriptor of the directory."""
        return self._directory

    @property
    def base(self) -> str:
        """The directory for temporary files that contains this one."""
        return os.path.dirname(self.path)

    @property
    def made_at(self) -> float:
        """When the directory was made, in seconds since the epoch."""
        return self._record.made_at - 1.0  # file systems use a slightly late clock

    @property
    def mark(self) -> int:
        """The mark of the worker's tree, see ``mark``."""
        return self._record.mark

    @property
    def knows_its_pids(self) -> bool:
        """Whether the recorded pids are of this boot and pid namespace."""
        return self._record.pid_space == linux.pid_space() != ""

    @property
    def temporary(self) -> str:
        """The worker's ``TMPDIR``."""
        return os.path.join(self.path, "tmp")

    def record_owners(self, processes: Iterable[Process]) -> None:
        """Record the owners of this directory."""
        self._record = self._record._replace(owners=list(processes))
        with contextlib.suppress(OSError):  # the lock says the same
            _write_record(self._lock, self._record)

    @property
    def untouched_for(self) -> float:
        """Seconds since a file was created or removed in it."""
        return time.time() - os.fstat(self._directory).st_mtime

    def remove(self, deadline: float, *, keep: str | None = None) -> list[str]:
        """Remove everything; describe what could not be removed and why.

        :param deadline: when to leave the rest to the next start (monotonic).
        :param keep: name of a file to keep for the next start, and with it the directory.
        """
        problems: list[str] = []
        for _ in range(2):  # a listing may miss entries that appear meanwhile
            problems = remove_contents(self._directory, deadline, keep=(_OWNER, keep))
            if not problems or time.monotonic() > deadline:
                break
        if not problems and keep is None:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_OWNER, dir_fd=self._directory)  # last: the next start looks for it
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(os.path.basename(self.path), dir_fd=self._base)
            except OSError as error:
                problems.append(str(error.strerror))
        return [f"{self.path}: {problem}" for problem in problems]

    def close(self) -> None:
        """Release the locks."""
        for descriptor in (self._lock, self._directory, self._base):
            os.close(descriptor)


def candidates(base: str) -> list[str]:
    """Return all paths in ``base`` that may be run directories."""
    try:
        return [os.path.join(base, name) for name in os.listdir(base) if _NAME.fullmatch(name)]
    except OSError:
        return []


def _in_words(problems: dict[str, OSError]) -> list[str]:
    return [f"{place}: {error.strerror}" for place, error in problems.items()]


def _opened(descriptor: int, undo: contextlib.ExitStack) -> int:
    """Have ``undo`` close a descriptor, and return it."""
    undo.callback(os.close, descriptor)
    return descriptor


def _quietly(function: Callable[..., None], name: str, directory: int) -> None:
    with contextlib.suppress(OSError):
        function(name, dir_fd=directory)


def _remove_empty(name: str, base: int, directory: int) -> None:
    """Remove an empty run directory without ``owner``: the process that created or removed it was killed half-way."""
    settled = time.time() - os.fstat(directory).st_mtime >= _SETTLED
    if settled and set(os.listdir(directory)) <= {"tmp"}:
        _quietly(os.rmdir, "tmp", directory)
        _quietly(os.rmdir, name, base)


def _is_private(descriptor: int) -> bool:
    """Return whether a file or directory belongs to this user and no other can write to it."""
    status = os.fstat(descriptor)
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _check_room(directory: int) -> None:
    """Check that a directory's file system has some room.

    :raises OSError: it is full, or nearly full.
    """
    room = os.fstatvfs(directory)
    free = room.f_bfree if os.geteuid() == 0 else room.f_bavail  # file systems reserve some for root
    files = room.f_ffree if os.geteuid() == 0 else room.f_favail
    if (room.f_blocks and free * room.f_frsize < _LEAST_BYTES) or (room.f_files and files < _LEAST_FILES):
        raise OSError(errno.ENOSPC, f"full ({free * room.f_frsize} bytes free, {files} files)")


def _lock(descriptor: int) -> bool:
    """Lock a file or directory while it is open; return whether that worked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(directory: int) -> bool:
    """Return whether our lock on ``owner`` excludes others, which it does not on some file systems."""
    other = os.open(_UNFINISHED, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
    try:
        return not _lock(other)
    finally:
        os.close(other)


def _open_owner(directory: int) -> int:
    """Open the file that records the owners.

    :raises OSError: it is missing or unusable.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        descriptor = open_regular(_OWNER, flags, dir_fd=directory)
    except FileNotFoundError:
        status = os.stat(_UNFINISHED, dir_fd=directory, follow_symlinks=False)
        if time.time() - status.st_mtime < _SETTLED:  # its creator is about to lock it
            raise
        descriptor = open_regular(_UNFINISHED, flags, dir_fd=directory)
    if not _is_private(descriptor):
        os.close(descriptor)
        raise FileNotFoundError
    return descriptor


def _dead_record(descriptor: int) -> _Record | None:
    """Lock ``owner`` and return its record if the owners are dead, else None."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        locked = False
    else:
        locked = True
    status = os.fstat(descriptor)
    if status.st_nlink == 0:  # another sweep was faster
        return None
    record = _read_record(descriptor)
    if record is None:
        old = time.time() - status.st_mtime >= _SETTLED
        return _Record([], "", locked, 0, status.st_mtime) if locked and old else None
    if record.pid_space == linux.pid_space() != "":
        return record if not any(map(linux.is_alive, record.owners)) else None
    return record if locked and record.locks_hold else None  # pids of another namespace mean nothing


def _write_record(descriptor: int, record: _Record) -> None:
    os.pwrite(descriptor, json.dumps(record._asdict()).encode().ljust(_RECORD_BYTES - 1) + b"\n", 0)


def _read_record(descriptor: int) -> _Record | None:
    try:
        text = json.loads(os.pread(descriptor, _RECORD_BYTES, 0))
        return _Record(
            [Process(int(pid), int(start)) for pid, start in text["owners"]],
            str(text["pid_space"]),
            bool(text["locks_hold"]),
            int(text["mark"]),
            float(text["made_at"]),
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
