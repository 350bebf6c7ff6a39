"""The worker's private directory: created before it, removed after it, and found again if nobody could remove it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PREFIX = "dw-"
_OWNER = "owner"

#: Where temporary files go if the environment does not say.
_USUAL_PLACES = ("/tmp", "/var/tmp", "/usr/tmp", ".")  # noqa: S108 -- mkdir with mode 0700 makes them safe

#: A directory without a legible owner may be one that is just being made.
_SETTLED = 60.0


class RunDirectory:
    """A directory that belongs to one supervisor and its guardian.

    A lock on ``owner``, which both hold through the same open file, says that one of them lives. It holds across pid
    namespaces, where a pid would say nothing.
    """

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls) -> RunDirectory:
        """Create ``dw-PID-RANDOM`` with ``tmp`` in it.

        :raises OSError: there is no place to write.
        """
        path = _make_directory()
        lock = os.open(os.path.join(path, _OWNER), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: the recorded processes have to do
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.mkdir(os.path.join(path, "tmp"), 0o700)
        return cls(path, lock)

    @classmethod
    def take_over(cls, path: str) -> RunDirectory | None:
        """Return a run directory whose owners are dead, locked, or None if it is not such a one."""
        try:
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                return None
            lock = os.open(os.path.join(path, _OWNER), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            pass
        owners = _read_owners(lock)
        if any(map(linux.is_alive, owners)) or (not owners and time.time() - status.st_mtime < _SETTLED):
            os.close(lock)
            return None
        return cls(path, lock)

    @property
    def base(self) -> str:
        """The directory for temporary files in which this one lies."""
        return os.path.dirname(self.path)

    @property
    def made_at(self) -> float:
        """When the directory was made, in seconds since the epoch and on the clock of file systems."""
        return os.fstat(self._lock).st_mtime - 1.0  # the file is written once, a moment later

    @property
    def temporary(self) -> str:
        """The worker's ``TMPDIR``."""
        return os.path.join(self.path, "tmp")

    def record_owners(self, processes: Iterable[Process]) -> None:
        """Write down who this directory belongs to."""
        os.pwrite(self._lock, json.dumps(list(processes)).encode() + b"\n", 0)

    def remove(self, deadline: float) -> list[str]:
        """Remove everything; return what could not be removed and why.

        :param deadline: when to leave the rest to the next start (monotonic).
        """
        for _ in range(2):  # the second time with all directories opened that were closed
            problems: list[str] = []
            for directory, directories, files in os.walk(self.path, topdown=False, onerror=_open_directory):
                for name in files:
                    if name != _OWNER or directory != self.path:  # that one last: the next start looks for it
                        _remove(os.path.join(directory, name), os.unlink, problems)
                for name in directories:
                    path = os.path.join(directory, name)
                    _remove(path, os.unlink if os.path.islink(path) else os.rmdir, problems)
                if time.monotonic() > deadline:
                    return [*problems[:3], f"{self.path}: no time left, the next start removes the rest"]
            if not problems:
                _remove(os.path.join(self.path, _OWNER), os.unlink, problems)
                _remove(self.path, os.rmdir, problems)
                break
        return problems

    def close(self) -> None:
        """Give the lock up."""
        os.close(self._lock)


def _make_directory() -> str:
    """Create an empty directory where the ``tempfile`` module would.

    :raises OSError: none of the usual places can be written to.
    """
    failure: OSError | None = None
    for base in (*map(os.environ.get, ("TMPDIR", "TEMP", "TMP")), *_USUAL_PLACES):
        if base:
            path = os.path.join(os.path.abspath(base), f"{_PREFIX}{os.getpid()}-{os.urandom(3).hex()}")
            try:
                os.mkdir(path, 0o700)
            except OSError as error:
                failure = failure or error
            else:
                return path
    assert failure is not None
    raise failure


def candidates(base: str) -> list[str]:
    """Return all paths in ``base`` that may be run directories."""
    try:
        return [os.path.join(base, name) for name in os.listdir(base) if name.startswith(_PREFIX)]
    except OSError:
        return []


def _read_owners(descriptor: int) -> list[Process]:
    try:
        return [Process(int(pid), int(start)) for pid, start in json.loads(os.pread(descriptor, 4096, 0))]
    except (OSError, ValueError, TypeError):
        return []


def _open_directory(error: OSError) -> None:
    """Make a directory readable that could not be listed."""
    with contextlib.suppress(OSError):  # then its removal fails, and says why
        os.chmod(error.filename, 0o700)


def _remove(path: str, function: Callable[[str], None], problems: list[str]) -> None:
    """Remove one entry; open a closed parent directory if that is what it takes."""
    try:
        function(path)
    except FileNotFoundError:
        pass
    except PermissionError:
        try:
            os.chmod(os.path.dirname(path), 0o700)
            function(path)
        except OSError as error:
            problems.append(str(error))
    except OSError as error:
        problems.append(str(error))
