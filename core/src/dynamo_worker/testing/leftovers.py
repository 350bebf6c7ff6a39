"""Detection of what a worker leaves behind: processes, shared memory, GPU memory and files."""

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

#: Set in the environment of every process of a test, which identifies it even if it detaches from its parent.
MARKER = "DYNAMO_WORKER_TEST"
#: Where the kernel keeps shared memory with names.
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - not a choice
#: Tolerated increase of used GPU memory during a test, in bytes. The driver's own use varies slightly.
_GPU_TOLERANCE = 64 << 20


def marked_processes(marker: str) -> dict[int, str]:
    """Return the PIDs and command lines of all running processes with the marker, excluding zombies."""
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
    """Return the segments that a running process without the marker maps: they belong to another program."""
    ours = marked_processes(marker)
    inodes: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            inodes[str(os.stat(f"{SHARED_MEMORY}/{name}").st_ino)] = name
    found: set[str] = set()
    for entry in os.listdir("/proc") if inodes else ():
        if not entry.isdigit() or int(entry) in ours:
            continue
        try:
            with open(f"/proc/{entry}/maps", encoding="utf-8", errors="replace") as file:
                # Compare inodes: a semaphore is mapped under the name with which it was created, not its current one.
                mapped = {line.split(maxsplit=5)[4] for line in file if SHARED_MEMORY in line}
        except OSError:
            continue
        found |= {inodes[inode] for inode in mapped & inodes.keys()}
    return found


def shared_memory() -> set[str]:
    """Return the names in ``/dev/shm``."""
    return set(os.listdir(SHARED_MEMORY))


def gpu_memory() -> int:
    """Return the bytes in use on all GPUs of this machine; 0 without a GPU."""
    return gpu.Nvml().used_memory() if gpu.present() else 0


@dataclass
class Leftovers:
    """Compares what exists after a test with what existed before it.

    :param marker: value of the variable that marks this test's processes.
    :param tmp: temporary directory of this test's processes; it must be empty at the end.
    """

    marker: str
    tmp: Path
    _segments: set[str] = field(default_factory=shared_memory)
    _gpu_memory: int = field(default_factory=gpu_memory)

    def find(self) -> list[str]:
        """Describe everything that is left, one line each."""
        left = [f"process {pid}: {command}" for pid, command in marked_processes(self.marker).items()]
        segments = shared_memory() - self._segments
        segments -= mapped_by_others(segments, self.marker)
        left += [f"{SHARED_MEMORY}/{name}" for name in sorted(segments)]
        left += [str(path) for path in sorted(self.tmp.iterdir())]
        more = gpu_memory() - self._gpu_memory
        if more > _GPU_TOLERANCE:
            left.append(f"GPU memory: {more >> 20} MiB more in use than before")
        return left

    def check(self, timeout: float = 0.5) -> None:
        """Fail if anything is left.

        :param timeout: time in seconds for the kernel to tear down killed processes.
        :raises AssertionError: something is left. Remaining processes are killed first, to protect the next test.
        """
        deadline = time.monotonic() + timeout
        while (left := self.find()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            self.remove()
            raise AssertionError("left behind:\n  " + "\n  ".join(left))

    def remove(self) -> None:
        """Kill all remaining processes."""
        for pid in marked_processes(self.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
