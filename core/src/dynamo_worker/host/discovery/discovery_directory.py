"""The directory of the ``file`` discovery backend. Write access to it is control over where requests go."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from dynamo_worker.errors import UsageError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.protocol import DEFAULT_FILE_KV
from dynamo_worker.supervisor.safe_place import UnsafePlaceError, check_above, make_directory, real_path

log = get_logger(__name__)

#: Prefixes of the names in a discovery directory: the runtime's buckets, its drafts and ours.
_OWN_PREFIXES: Final = ("v1", ".tmp_")


def writable_directory(path: Path | None) -> Path:
    """Return the directory of the file backend with all links resolved; create it if it is missing.

    It must belong to this user alone. If other users have access to it, their permissions are removed.

    :param path: the directory, or None for that of the runtime (``DYN_FILE_KV``, or its default).
    :raises UsageError: it cannot be created, belongs to another user, has other contents, or other users can replace
        it.
    """
    directory = path or Path(os.environ.get("DYN_FILE_KV") or DEFAULT_FILE_KV)
    try:
        with contextlib.ExitStack() as opened:
            descriptor = make_directory(str(directory))
            opened.callback(os.close, descriptor)
            real = Path(real_path(descriptor))
            if not os.access(real, os.W_OK | os.X_OK):
                raise UsageError(f"the discovery directory {directory} is not writable", hint="see --discovery-path")
            owner, owner_of_path = os.fstat(descriptor).st_uid, os.lstat(directory).st_uid  # it may be a link
            if owner != os.geteuid() or owner_of_path not in (0, os.geteuid()):
                raise UsageError(
                    f"the discovery directory {directory} belongs to another user "
                    f"({owner if owner != os.geteuid() else owner_of_path}), who could replace workers in it and "
                    "receive their requests",
                    hint="set --discovery-path to a directory of your own",
                )
            check_above(descriptor)
            _close_to_others(real, descriptor)
            return real
    except UnsafePlaceError as error:
        raise UsageError(
            f"the discovery directory {directory} is not safe, another user could replace it: {error.words}",
            hint=f"{error.advice}; or " * bool(error.advice) + "set --discovery-path to a directory of your own",
        ) from error
    except OSError as error:
        raise UsageError(
            f"the discovery directory {directory} cannot be created: {error.strerror}", hint="see --discovery-path"
        ) from error


def _close_to_others(directory: Path, descriptor: int) -> None:
    """Remove other users' permissions from a discovery directory of ours.

    What the runtime creates in it gets its mode from the umask. With 002, which is common on clusters, the group could
    write there.

    :raises UsageError: the directory is not for discovery alone, such as root's own ``/tmp``, or its file system does
        not allow the change.
    """
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return
    itself = f"/proc/self/fd/{descriptor}"
    foreign = any(not name.startswith(_OWN_PREFIXES) for name in os.listdir(itself))
    if not mode & (stat.S_IWGRP | stat.S_IWOTH) and (foreign or mode & stat.S_ISVTX):
        return  # no other user can write to it, and its other contents may need its mode
    if foreign or mode & stat.S_ISVTX:
        raise UsageError(
            f"the discovery directory {directory} is open to other users (mode {mode:04o}), who could replace workers "
            "in it and receive their requests; it has other contents, so its mode was not changed",
            hint="set --discovery-path to a directory for discovery alone",
        )
    with contextlib.suppress(OSError):
        os.chmod(itself, mode & ~(stat.S_IRWXG | stat.S_IRWXO) | stat.S_IRWXU)
    # Some file systems have one mode for all files, including those that the runtime will create.
    left = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if left & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"the discovery directory {directory} is open to other users (mode {left:04o}), who could replace workers "
            "in it and receive their requests; its file system does not allow a stricter mode",
            hint="set --discovery-path to a directory on another file system",
        )
    if left != mode:
        log.warning("Discovery directory closed to other users", directory=directory, mode=f"{mode:04o}")
