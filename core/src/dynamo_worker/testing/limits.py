"""Resource limits for random faults: from the start of a worker on, or all at once while it runs."""

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

#: Where cgroups with a pids controller may be made: version 1, and version 2 where the controller is delegated.
_PIDS_CGROUPS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))


class Limit(Protocol):
    """One resource that runs short."""

    #: Arguments in front of the worker's command.
    prefix: Sequence[str]

    def tighten(self, pids: Sequence[int]) -> None:
        """Leave no more of the resource than is used now; only for limits that do not hold from the start.

        :param pids: the worker and what is below it. Supervisor and guardian have limits of their own, and no reason to
            reach them.
        """

    def lift(self) -> None:
        """Undo what would outlive the worker."""


def shell(command: str) -> list[str]:
    """Return arguments that run a shell command first, in the process that becomes the worker. Never dumps core."""
    return ["sh", "-c", f'ulimit -c 0; {command} exec "$@"', "sh"]


class _Unlimited:
    """Nothing runs short."""

    def __init__(self) -> None:
        self.prefix: Sequence[str] = shell("")

    def tighten(self, pids: Sequence[int]) -> None:
        """Do nothing."""

    def lift(self) -> None:
        """Do nothing."""


class _Ulimit:
    """A limit that the kernel keeps for each process."""

    def __init__(self, letter: str, number: int, amount: int | None) -> None:
        self._number = number
        self.prefix: Sequence[str] = shell("" if amount is None else f"ulimit -{letter} {amount};")

    def tighten(self, pids: Sequence[int]) -> None:
        """Set every process's limit to what it uses."""
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
    """A cgroup for so many tasks, threads included."""

    def __init__(self, amount: int | None) -> None:
        parent = pids_cgroup()
        assert parent is not None
        self._group = parent / f"dynamo-worker-test-{os.urandom(4).hex()}"
        self._group.mkdir()
        if amount is not None:
            (self._group / "pids.max").write_text(str(amount))
        self.prefix: Sequence[str] = shell(f"echo $$ > '{self._group}/cgroup.procs';")

    def tighten(self, pids: Sequence[int]) -> None:  # noqa: ARG002 - the group counts for itself
        """Let nobody fork any more."""
        (self._group / "pids.max").write_text((self._group / "pids.current").read_text())

    def lift(self) -> None:
        """Remove the group, if everything in it has ended."""
        with contextlib.suppress(OSError):
            (self._group / "pids.max").write_text("max")
            self._group.rmdir()


class _SmallTmp:
    """A small file system for temporary files, which fills up."""

    def __init__(self, tmp: Path, amount: int | None) -> None:
        self._tmp = tmp
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(tmp)], check=True)
        self.prefix: Sequence[str] = shell("")
        if amount is not None:
            self._fill(amount)

    def tighten(self, pids: Sequence[int]) -> None:  # noqa: ARG002 - the file system is full for everybody
        """Leave no room."""
        self._fill(0)

    def _fill(self, left: int) -> None:
        """Write a file that leaves so many bytes."""
        status = os.statvfs(self._tmp)
        with contextlib.suppress(OSError), open(self._tmp / FILLING, "wb", buffering=0) as file:
            file.write(bytes(max(0, status.f_bavail * status.f_frsize - left)))

    def lift(self) -> None:
        """Unmount it."""
        with contextlib.suppress(FileNotFoundError):
            (self._tmp / FILLING).unlink()
        subprocess.run(["umount", "--lazy", str(self._tmp)], check=False)


#: The file that fills a small file system; none of the worker's.
FILLING = "filling"

#: Names of the limits, and amounts from the start on; None is none until it is tightened.
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
    """Return whether this machine and this user can have the limit."""
    if name == "pids":
        return pids_cgroup() is not None
    return name != "tmp" or (os.geteuid() == 0 and _can_mount())


@contextlib.contextmanager
def limited(name: str, amount: int | None, tmp: Path) -> Iterator[Limit]:
    """Make a limit, and undo it in the end.

    :param amount: what there is from the start on (kilobytes of memory, bytes, or a number); None is enough.
    :param tmp: the temporary directory of the worker.
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
    """Return a cgroup in which groups with a limit of tasks can be made."""
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
    """Return whether this user may mount file systems: root in a container may not."""
    result = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return result.returncode == 0
