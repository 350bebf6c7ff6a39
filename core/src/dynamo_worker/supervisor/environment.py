"""The worker's environment, derived from the supervisor's."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Final

from dynamo_worker.supervisor import interpreter
from dynamo_worker.supervisor.protocol import CONTROL_FD, RUN_DIR
from dynamo_worker.supervisor.safe_place import check_place, make_directory, real_path

if TYPE_CHECKING:
    from dynamo_worker.supervisor.run_directory import RunDirectory

#: Variables that systemd sets for the supervisor only.
_OURS: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

#: Directories for caches that must outlive the worker although they lie in TMPDIR by default.
_LASTING_CACHES: Final = (("TORCHINDUCTOR_CACHE_DIR", "torchinductor_{user}"),)

#: PyTorch compiles its C++ headers into TMPDIR, whatever its cache directory is: 4 s at every start, for kernels that
#: are in the cache already.
_NO_PRECOMPILED_HEADERS: Final = ("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")

#: The seed of Python's hashes: engines and their KV caches derive the keys of blocks from it, which have to be the same
#: in all processes of all workers. It takes effect where an interpreter starts.
HASH_SEED: Final = ("PYTHONHASHSEED", "0")


def worker_environment(directory: RunDirectory, control: int) -> dict[str, str]:
    """Return the worker's environment.

    :param control: descriptor of the worker's end of its control socket.
    """
    environment = dict(os.environ)
    for name in _OURS:
        environment.pop(name, None)
    for variable, name in _LASTING_CACHES:
        if variable not in environment:
            place = lasting_cache(directory.base, name.format(user=user_name()))
            if place is not None:
                environment[variable] = place
    environment.setdefault(*_NO_PRECOMPILED_HEADERS)
    environment.setdefault(*HASH_SEED)
    environment.setdefault(interpreter.SAFE_PATH, "1")
    environment[CONTROL_FD] = str(control)
    environment[RUN_DIR] = directory.path
    environment["TMPDIR"] = directory.temporary
    return environment


def lasting_cache(base: str, name: str) -> str | None:
    """Return a directory for a cache whose content is executed, or None.

    Without one, the cache lies in TMPDIR and is removed with the worker.

    Its usual place is easy to guess. So it has to belong to this user alone, and nobody else may be able to replace it.
    It is created there only if there is no home directory, or that of another user (``sudo -E``): most workers compile
    nothing, and a worker leaves no temporary files behind.

    :param base: the directory for temporary files.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    usual = os.path.join(base, name)
    lasting = os.path.join(os.path.realpath(cache), "dynamo-worker", name) if os.path.isabs(cache) else None
    for place, make in ((usual, False), (lasting, True), (usual, True)):
        if place is None:
            continue
        with contextlib.suppress(OSError):
            if make:
                os.close(make_directory(place))
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                check_place(descriptor)
                status = os.fstat(descriptor)
                if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    os.fchmod(descriptor, 0o700)
                    return real_path(descriptor)
            finally:
                os.close(descriptor)
    return None


def user_name() -> str:
    """Return the user's name as PyTorch finds it for the default place of its cache."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        name = os.environ.get(variable)
        if name:
            break
    else:
        import pwd

        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = str(os.getuid())
    return "".join("_" if character in '\\/:*?"<>|' else character for character in name)
