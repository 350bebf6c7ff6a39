"""Opening files in whose place somebody may have put something else."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str], flags: int, *, dir_fd: int | None = None) -> int:
    """Open a regular file and return its descriptor. Never blocks: not for a FIFO without another end either.

    :param flags: as for ``os.open``; with ``O_NOFOLLOW`` a link is refused, too.
    :param dir_fd: descriptor of the directory from which a relative path leads.
    :raises OSError: there is none, or it is something else.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return descriptor
