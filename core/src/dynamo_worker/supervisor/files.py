"""Opens files safely, even if another user may have replaced them."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str], flags: int, *, dir_fd: int | None = None) -> int:
    """Open a regular file and return its descriptor. Never blocks, not even on a FIFO without a writer.

    :param flags: as for ``os.open``; ``O_NOFOLLOW`` also refuses a symbolic link.
    :param dir_fd: descriptor of the directory that a relative path starts from.
    :raises OSError: the file is missing, or is not a regular one.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return descriptor
