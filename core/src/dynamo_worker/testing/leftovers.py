"""Finding what a worker leaves behind: processes, shared memory, GPU memory, files."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import gpu

if TYPE_CHECKING:
    from pathlib import Path

#: Every process of a test carries this variable, however far it strays from its parents.
MARKER = "DYNAMO_WORKER_TEST"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where the kernel keeps it
#: How much more GPU memory may be in use after a test than before it, in bytes: the driver's own use varies a little.
_GPU_TOLERANCE = 64 << 20


def marked_processes(marker: str) -> dict[int, str]:
    """Return the living processes that carry the marker: pid and command line. Zombies do not count."""
    wanted = f"{MARKER}={marker}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if wanted not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                found[int(entry)] = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except (OSError, PermissionError):
            continue
    return found


def mapped_by_others(names: set[str], marker: str) -> set[str]:
    """Return those of the segments that a living process without the marker maps: another program's, not ours."""
    ours = marked_processes(marker)
    inodes: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            inodes[str(os.stat(f"{_SHARED_MEMORY}/{name}").st_ino)] = name
    found: set[str] = set()
    for entry in os.listdir("/proc") if inodes else ():
        if not entry.isdigit() or int(entry) in ours:
            continue
        try:
            with open(f"/proc/{entry}/maps", encoding="utf-8", errors="replace") as file:
                # By inode: a semaphore is mapped under the name it was made with, not the one it has.
                mapped = {line.split(maxsplit=5)[4] for line in file if _SHARED_MEMORY in line}
        except OSError:
            continue
        found |= {inodes[inode] for inode in mapped & inodes.keys()}
    return found


def shared_memory() -> set[str]:
    """Return the names in ``/dev/shm``."""
    return set(os.listdir(_SHARED_MEMORY))


def gpu_memory() -> int:
    """Return the bytes in use on all GPUs of this machine, 0 where there is none."""
    return gpu.Nvml().used_memory() if gpu.present() else 0


@dataclass
class Leftovers:
    """Remembers what was there before a test and tells what is there after it.

    :param marker: value of the marker variable of this test's processes.
    :param tmp: the temporary directory of this test's processes; must be empty at the end.
    """

    marker: str
    tmp: Path
    _segments: set[str] = field(default_factory=shared_memory)
    _gpu_memory: int = field(default_factory=gpu_memory)

    def find(self) -> list[str]:
        """Return what is left now, one line each."""
        left = [f"process {pid}: {command}" for pid, command in marked_processes(self.marker).items()]
        segments = shared_memory() - self._segments
        segments -= mapped_by_others(segments, self.marker)
        left += [f"{_SHARED_MEMORY}/{name}" for name in sorted(segments)]
        left += [str(path) for path in sorted(self.tmp.iterdir())]
        more = gpu_memory() - self._gpu_memory
        if more > _GPU_TOLERANCE:
            left.append(f"GPU memory: {more >> 20} MiB more than before")
        return left

    def check(self, timeout: float = 0.5) -> None:
        """Fail if anything is left.

        :param timeout: seconds the kernel gets to take down what was just killed.
        :raises AssertionError: something is left; it is removed, so that the next test starts clean.
        """
        deadline = time.monotonic() + timeout
        while (left := self.find()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            self.remove()
            raise AssertionError("left behind:\n  " + "\n  ".join(left))

    def remove(self) -> None:
        """Kill the processes that are left."""
        for pid in marked_processes(self.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
