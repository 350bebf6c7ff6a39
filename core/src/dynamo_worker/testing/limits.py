"""Resource limits for random faults: in effect from the start of a worker, or imposed while it runs."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Where cgroups with a pids controller can be created: version 1, and version 2 if the controller is delegated.
_PIDS_CGROUPS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))


class Limit(Protocol):
    """A limit on one resource."""

    #: Arguments to put in front of the worker's command.
    prefix: Sequence[str]

    def tighten(self, pids: Sequence[int]) -> None:
        """Reduce the limit to what is in use now. Only for limits that are not in effect from the start.

        :param pids: the worker and its descendants, without supervisor and guardian.
        """

    def lift(self) -> None:
        """Remove whatever would outlive the worker."""


def shell(command: str) -> list[str]:
    """Return a prefix that runs a shell command in the process that becomes the worker. Disables core dumps."""
    return ["sh", "-c", f'ulimit -c 0; {command} exec "$@"', "sh"]


class _Unlimited:
    """No limit."""

    def __init__(self) -> None:
        self.prefix: Sequence[str] = shell("")

    def tighten(self, pids: Sequence[int]) -> None:
        """Do nothing."""

    def lift(self) -> None:
        """Do nothing."""


class _Ulimit:
    """A per-process limit of the kernel."""

    def __init__(self, letter: str, number: int, amount: int | None) -> None:
        self._number = number
        self.prefix: Sequence[str] = shell("" if amount is None else f"ulimit -{letter} {amount};")

    def tighten(self, pids: Sequence[int]) -> None:
        """Set the limit of each process to what it uses now."""
        for pid in pids:
            with contextlib.suppress(OSError, ValueError):
                used = self._used(pid)
                resource.prlimit(pid, self._number, (used, used))

    def _used(self, pid: int) -> int:
        if self._number == resource.RLIMIT_NOFILE:
            return max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
        if self._number == resource.RLIMIT_AS:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        return 0

    def lift(self) -> None:
        """Do nothing: the limit ends with the processes."""


class _Pids:
    """A cgroup that limits the number of tasks, including threads."""

    def __init__(self, amount: int | None) -> None:
        parent = pids_cgroup()
        assert parent is not None
        self._group = parent / f"dynamo-worker-test-{os.urandom(4).hex()}"
        self._group.mkdir()
        if amount is not None:
            (self._group / "pids.max").write_text(str(amount))
        self.prefix: Sequence[str] = shell(f"echo $$ > '{self._group}/cgroup.procs';")

    def tighten(self, pids: Sequence[int]) -> None:  # noqa: ARG002 - the cgroup counts its tasks
        """Make every further fork fail."""
        (self._group / "pids.max").write_text((self._group / "pids.current").read_text())

    def lift(self) -> None:
        """Remove the cgroup if all of its processes have exited."""
        with contextlib.suppress(OSError):
            (self._group / "pids.max").write_text("max")
            self._group.rmdir()


class _SmallTmp:
    """A small file system for temporary files that fills up."""

    def __init__(self, tmp: Path, amount: int | None) -> None:
        self._tmp = tmp
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(tmp)], check=True)
        self.prefix: Sequence[str] = shell("")
        if amount is not None:
            self._fill(amount)

    def tighten(self, pids: Sequence[int]) -> None:  # noqa: ARG002 - all processes share the file system
        """Leave no free space."""
        self._fill(0)

    def _fill(self, left: int) -> None:
        """Write a file that leaves ``left`` bytes free."""
        status = os.statvfs(self._tmp)
        with contextlib.suppress(OSError), open(self._tmp / FILLING, "wb", buffering=0) as file:
            file.write(bytes(max(0, status.f_bavail * status.f_frsize - left)))

    def lift(self) -> None:
        """Unmount the file system."""
        with contextlib.suppress(FileNotFoundError):
            (self._tmp / FILLING).unlink()
        subprocess.run(["umount", "--lazy", str(self._tmp)], check=False)


#: Name of the file that fills a small file system; not one of the worker's.
FILLING = "filling"

#: Initial amounts by name of the limit; None means no limit until it is tightened.
AMOUNTS: dict[str, tuple[int | None, ...]] = {
    "none": (None,),
    "files": (12, 16, 20, 24, 32, 48, 64, None, None, None),
    "file size": (0, 10, 4096, None, None, None),
    "memory": (300_000, 600_000, 1_000_000, 2_000_000, None),
    "pids": (2, 3, 4, 6, 10, 14, 20, None, None, None, None),
    "tmp": (0, 4096, 65_536, None, None),
}


@functools.cache
def possible(name: str) -> bool:
    """Return whether this user can set the limit on this machine."""
    if name == "pids":
        return pids_cgroup() is not None
    return name != "tmp" or (os.geteuid() == 0 and _can_mount())


@contextlib.contextmanager
def limited(name: str, amount: int | None, tmp: Path) -> Iterator[Limit]:
    """Set a limit during a ``with`` block.

    :param name: name of the limit, a key of :data:`AMOUNTS`.
    :param amount: initial amount: kilobytes for "memory", bytes for "file size" and "tmp", otherwise a count; None
        sets no limit until it is tightened.
    :param tmp: the worker's temporary directory.
    """
    limit: Limit
    if name == "files":
        limit = _Ulimit("n", resource.RLIMIT_NOFILE, amount)
    elif name == "file size":
        # Shells count blocks of 512 bytes.
        limit = _Ulimit("f", resource.RLIMIT_FSIZE, None if amount is None else amount // 512)
    elif name == "memory":
        limit = _Ulimit("v", resource.RLIMIT_AS, amount)
    elif name == "pids":
        limit = _Pids(amount)
    elif name == "tmp":
        limit = _SmallTmp(tmp, amount)
    else:
        limit = _Unlimited()
    try:
        yield limit
    finally:
        limit.lift()


def pids_cgroup() -> Path | None:
    """Return a cgroup in which groups with a task limit can be created; None if there is none."""
    for path in _PIDS_CGROUPS:
        probe = path / f"dynamo-worker-probe-{os.getpid()}"
        try:
            probe.mkdir()
        except OSError:
            continue
        try:
            if (probe / "pids.max").exists():
                return path
        finally:
            probe.rmdir()
    return None


def _can_mount() -> bool:
    """Return whether this user may mount file systems, which even root may not in some containers."""
    result = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return result.returncode == 0
