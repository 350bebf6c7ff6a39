"""Empties a directory of any depth by descriptors: follows no link, enters no other file system, ends in time."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: Problems that are described; further ones are counted.
_MOST_PROBLEMS = 3

#: Entries that are removed whatever the clock says: the machine may not have let us run for a while.
_FREE_ENTRIES = 100


class _Identity(NamedTuple):
    """Identifies a directory, whatever its name."""

    device: int
    inode: int
    mount: bytes


class _Level(NamedTuple):
    """One directory on the way down, with the subdirectories that are still to be removed."""

    name: str
    identity: _Identity
    directories: list[str]


def remove_contents(directory: int, deadline: float, keep: Container[str | None] = ()) -> list[str]:
    """Remove everything in a directory; describe what could not be removed and why.

    Holds three descriptors at most: it goes back up by ``..``, and checks that this leads where it came from.

    :param directory: its descriptor.
    :param deadline: when to stop (monotonic).
    :param keep: names in the directory itself to keep.
    """
    problems: list[str] = []
    unnamed = seen = 0

    def failed(name: str, error: OSError) -> None:
        nonlocal unnamed
        if isinstance(error, FileNotFoundError):
            return
        if len(problems) < _MOST_PROBLEMS:
            problems.append(f"{name}: {error.strerror}")
        else:
            unnamed += 1

    def unlink_files(descriptor: int, keep: Container[str | None]) -> list[str]:
        """Remove everything but directories; return the names of those."""
        nonlocal seen
        directories = []
        with os.scandir(descriptor) as entries:
            for entry in entries:
                seen += 1
                if seen > _FREE_ENTRIES and time.monotonic() > deadline:
                    raise TimeoutError
                if entry.name in keep:
                    continue
                try:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.name)
                    else:
                        os.unlink(entry.name, dir_fd=descriptor)
                except OSError as error:
                    failed(entry.name, error)
        return directories

    current = os.open(".", _FLAGS, dir_fd=directory)
    try:
        levels = [_Level(".", _identity(current), unlink_files(current, keep))]
        while True:
            if seen > _FREE_ENTRIES and time.monotonic() > deadline:
                raise TimeoutError
            level = levels[-1]
            if level.directories:
                name = level.directories.pop()
                try:
                    child = _open(name, current)
                except OSError as error:
                    failed(name, error)
                    continue
                identity = _identity(child)
                if identity.mount == level.identity.mount and identity.device == level.identity.device:
                    os.close(current)
                    current = child
                    levels.append(_Level(name, identity, unlink_files(current, ())))
                    continue
                os.close(child)  # the content of a mount is not ours: only try to remove the mount point
            elif len(levels) > 1:
                name = levels.pop().name
                parent = os.open("..", _FLAGS, dir_fd=current)
                os.close(current)
                current = parent
                if _identity(current) != levels[-1].identity:
                    problems.append(f"{name}: moved during its removal")
                    break
            else:
                break
            try:
                os.rmdir(name, dir_fd=current)
            except OSError as error:
                failed(name, error)
    except TimeoutError:
        problems.append("no time left; the next start removes the rest")
    except OSError as error:
        problems.append(f"listing a directory: {error.strerror}")
    finally:
        os.close(current)
    return [*problems, f"and {unnamed} more"] if unnamed else problems


def _open(name: str, parent: int) -> int:
    """Open a directory to empty it, even if its mode forbids that."""
    try:
        descriptor = os.open(name, _FLAGS, dir_fd=parent)
    except PermissionError:
        path = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{path}", 0o700)
            descriptor = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(path)
    mode = os.fstat(descriptor).st_mode
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        with contextlib.suppress(OSError):  # removing its content fails then, and reports why
            os.fchmod(descriptor, 0o700)
    return descriptor


def _identity(descriptor: int) -> _Identity:
    status = os.fstat(descriptor)
    mount = b""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:
        mount = next((line for line in file.read(4096).splitlines() if line.startswith(b"mnt_id:")), b"")
    return _Identity(status.st_dev, status.st_ino, mount)
