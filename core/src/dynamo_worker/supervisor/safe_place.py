"""Directories that nobody else can replace: how to check for that, and how to make one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from dynamo_worker.supervisor import linux

#: Opens a directory only to look at it, or to work in it.
PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class UnsafePlaceError(PermissionError):
    """Somebody else can put something else in the place of a directory.

    :param advice: what the owner of the directory that is to blame can do, in words, or nothing.
    """

    def __init__(self, words: str, advice: str = "") -> None:
        super().__init__(errno.EPERM, f"{words} ({advice})" if advice else words)
        self.words = words
        self.advice = advice


def make_safe(place: str, base: int) -> list[str]:
    """Make sure that nobody else can put anything in the place of a directory that is made in ``place``.

    Whoever may write in a directory, or in one above it, may rename what is in it, unless the sticky bit is set; its
    owner may in any case. Such is TMPDIR in a pod of Kubernetes, where the volume ``emptyDir`` has mode 0777.

    :param base: descriptor of ``place``.
    :return: what was changed, in words.
    :raises OSError: somebody else can.
    """
    changed = []
    status = os.fstat(base)
    if status.st_uid == os.geteuid() and _may_be_renamed_in(status):
        check_above(base)  # first: what is not used is not changed
        os.chmod(f"/proc/self/fd/{base}", stat.S_IMODE(status.st_mode) | stat.S_ISVTX)
        changed.append(f"{place}: others may write there; the sticky bit was set")
    check_place(base)
    return changed


def real_path(directory: int) -> str:
    """Return where a directory lies, without any link: one on the way to it could lead elsewhere later."""
    return os.readlink(f"/proc/self/fd/{directory}")


def make_directory(path: str) -> int:
    """Open a directory. What is missing of its path is made, for this user alone and whatever the umask.

    :return: a descriptor of it (``O_PATH``), to be checked with ``check_place``.
    :raises UnsafePlaceError: it would have to be made where others could put something else in its place.
    :raises OSError: it cannot be made.
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
    """Check that nobody else can put another directory in the place of this one, whoever may write in itself.

    :param directory: its descriptor.
    :raises UnsafePlaceError: somebody can.
    """
    above = os.open("..", PLACE, dir_fd=directory)
    try:
        check_place(above)
    finally:
        os.close(above)


def check_place(directory: int) -> None:
    """Check that nobody else can rename what is in a directory, or put another one in its place.

    :param directory: its descriptor.
    :raises UnsafePlaceError: somebody can.
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
    """Return whether users other than its owner may rename what is in a directory."""
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not status.st_mode & stat.S_ISVTX
