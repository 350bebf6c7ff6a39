"""Directories that other users cannot replace: checks for that, and creation."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from dynamo_worker.supervisor import linux

#: Flags to open a directory for inspection, or as a base of relative paths.
PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class UnsafePlaceError(PermissionError):
    """Another user can replace a directory.

    :param words: why.
    :param advice: what the owner of the offending directory can do; empty: nothing.
    """

    def __init__(self, words: str, advice: str = "") -> None:
        super().__init__(errno.EPERM, f"{words} ({advice})" if advice else words)
        self.words = words
        self.advice = advice


def make_safe(place: str, base: int) -> list[str]:
    """Make sure that other users cannot replace a directory created in ``place``.

    A user who can write to a directory, or to one above it, can rename its entries, unless the sticky bit is set; its
    owner always can. TMPDIR in a Kubernetes pod is an example: an ``emptyDir`` volume has mode 0777.

    :param base: descriptor of ``place``.
    :return: descriptions of what was changed.
    :raises OSError: another user can.
    """
    changed = []
    status = os.fstat(base)
    if status.st_uid == os.geteuid() and _may_be_renamed_in(status):
        check_above(base)  # first: a directory that will not be used must not be changed
        os.chmod(f"/proc/self/fd/{base}", stat.S_IMODE(status.st_mode) | stat.S_ISVTX)
        changed.append(f"{place}: others may write there; the sticky bit was set")
    check_place(base)
    return changed


def real_path(directory: int) -> str:
    """Return a directory's path without links, which could lead elsewhere later."""
    return os.readlink(f"/proc/self/fd/{directory}")


def make_directory(path: str) -> int:
    """Open a directory, creating missing ones with mode 0700 whatever the umask.

    :return: a descriptor (``O_PATH``), to be checked with ``check_place``.
    :raises UnsafePlaceError: it would be created where others could replace it.
    :raises OSError: it cannot be created.
    """
    missing: list[str] = []
    while True:
        try:
            directory = os.open(path or ".", PLACE)
            break
        except FileNotFoundError:
            path, name = os.path.split(path)
            missing.append(name)
    try:
        if missing:
            check_place(directory)
        for name in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=directory)
            below = os.open(name, PLACE | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
    except OSError:
        os.close(directory)
        raise
    return directory


def check_above(directory: int) -> None:
    """Check that other users cannot replace a directory, even if they can write in it.

    :param directory: its descriptor.
    :raises UnsafePlaceError: they can.
    """
    above = os.open("..", PLACE, dir_fd=directory)
    try:
        check_place(above)
    finally:
        os.close(above)


def check_place(directory: int) -> None:
    """Check that other users can neither rename the entries of a directory nor replace the directory itself.

    :param directory: its descriptor.
    :raises UnsafePlaceError: they can.
    """
    status = os.fstat(directory)
    above = os.open(f"/proc/self/fd/{directory}", PLACE)
    try:
        while True:
            if status.st_uid not in (0, os.geteuid(), linux.unmapped_user()):
                raise UnsafePlaceError(f"{real_path(above)} belongs to another user ({status.st_uid})")
            if _may_be_renamed_in(status):
                path = real_path(above)
                words = f"others may write in {path}, which has no sticky bit"
                raise UnsafePlaceError(words, f"chmod go-w {path}, or +t")
            parent = os.open("..", PLACE, dir_fd=above)
            os.close(above)
            above = parent
            last, status = status, os.fstat(above)
            if os.path.samestat(last, status):
                return
    finally:
        os.close(above)


def _may_be_renamed_in(status: os.stat_result) -> bool:
    """Return whether users other than its owner can rename the entries of a directory."""
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not status.st_mode & stat.S_ISVTX
