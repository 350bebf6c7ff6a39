"""Linux calls that the standard library lacks (prctl, inotify), and information about processes from /proc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

IN_CLOSE_WRITE = 0x8
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_Q_OVERFLOW = 0x4000

#: Reads of inotify at once: a flood of events must not keep us from our timers, nor fill our memory. This is more than
#: the kernel's queue holds (16384 events), unless names are very long.
_MOST_READS = 32

_libc = ctypes.CDLL(None, use_errno=True)


class Process(NamedTuple):
    """One process, pinned against the reuse of its pid by its start time (clock ticks since boot)."""

    pid: int
    start: int


class Stat(NamedTuple):
    """The fields of ``/proc/PID/stat`` that matter here."""

    name: str
    state: str
    parent: int
    group: int
    threads: int
    start: int
    #: CPU time that all of its threads have used, in clock ticks.
    ticks: int

    @property
    def ended(self) -> bool:
        """Whether it only waits to be reaped. Other threads may still run, or hang, after the first one has ended."""
        return self.state in "ZX" and self.threads <= 1


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def become_subreaper() -> None:
    """Adopt orphaned descendants, so none can escape by a double fork."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def on_parent_death(number: int, parent: int) -> bool:
    """Have the kernel send us a signal when the process that forked us ends.

    :return: False if the parent has already ended, so the signal will never come.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


def set_name(name: str) -> None:
    """Set the name that ``ps`` and ``top`` show for this process (at most 15 bytes)."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def watch_directory(path: str, mask: int) -> int:
    """Return a non-blocking inotify descriptor that reports ``mask`` for one directory."""
    descriptor = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
    try:
        _check(_libc.inotify_add_watch(descriptor, os.fsencode(path), mask), "inotify_add_watch")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_events(descriptor: int) -> list[tuple[int, str]]:
    """Return pending inotify events as ``(mask, file name)``; events that arrive meanwhile may be left for later."""
    events: list[tuple[int, str]] = []
    for _ in range(_MOST_READS):
        try:
            data = os.read(descriptor, 64 * 1024)
        except BlockingIOError:
            break
        at = 0
        while at + 16 <= len(data):
            mask = int.from_bytes(data[at + 4 : at + 8], sys.byteorder)
            length = int.from_bytes(data[at + 12 : at + 16], sys.byteorder)
            name = data[at + 16 : at + 16 + length].split(b"\0", 1)[0]
            events.append((mask, os.fsdecode(name)))
            at += 16 + length
    return events


def read_stat(pid: int) -> Stat | None:
    """Return the fields of ``/proc/PID/stat`` for a process, or None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(1024)
    except OSError:
        return None
    opening, closing = text.find(b"("), text.rfind(b")")  # the name may contain spaces and parentheses
    fields = text[closing + 2 :].split()
    name = text[opening + 1 : closing].decode("utf-8", "replace")
    return Stat(
        name=name,
        state=chr(fields[0][0]),
        parent=int(fields[1]),
        group=int(fields[2]),
        threads=int(fields[17]),
        start=int(fields[19]),
        ticks=int(fields[11]) + int(fields[12]),
    )


def age(pid: int) -> float | None:
    """Return the seconds since a process started, or None if it is gone."""
    stat = read_stat(pid)
    return None if stat is None else time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start / os.sysconf("SC_CLK_TCK")


def is_alive(process: Process) -> bool:
    """Return whether exactly this process still runs; a zombie does not."""
    stat = read_stat(process.pid)
    return stat is not None and stat.start == process.start and not stat.ended


def all_pids() -> list[int]:
    """Return the pids of all visible processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def pid_space() -> str:
    """Identify this boot and pid namespace, within which a pid has one meaning; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def unmapped_user() -> int | None:
    """Return the uid by which a user namespace shows users it does not map, possibly root; None outside of one."""
    try:
        with open("/proc/self/uid_map", "rb", buffering=0) as file:
            if file.read(4096).split() == [b"0", b"0", b"4294967295"]:
                return None
        with open("/proc/sys/kernel/overflowuid", "rb", buffering=0) as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None


def send_signal(process: Process, number: int) -> bool:
    """Signal exactly this process, never a later one with the same pid; return whether the process existed."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:  # no pidfd (old kernel, seccomp): check, then signal; the race lasts microseconds
        stat = read_stat(process.pid)
        if stat is None or stat.start != process.start:
            return False
        try:
            os.kill(process.pid, number)
        except OSError:
            return False
        return True
    try:
        stat = read_stat(process.pid)  # read after the pid was pinned
        if stat is None or stat.start != process.start:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def catches(pid: int, number: int) -> bool:
    """Return whether a process has installed a handler for a signal, which might end it otherwise."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        for line in file.read(8192).splitlines():
            if line.startswith(b"SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def memory_kills() -> int | None:
    """Return how many processes of our memory cgroup the OOM killer has killed, or None if unknown."""
    paths = _of_memory_cgroup("memory.events", "memory.oom_control")
    return next((count for count in map(_memory_kills_in, paths) if count is not None), None)


def _of_memory_cgroup(unified: str, legacy: str) -> list[str]:
    """Return where a file of our memory cgroup may be.

    :param unified: its name with cgroup v2.
    :param legacy: its name with v1.
    """
    paths = []
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            for line in file:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                if not controllers:
                    paths += [f"/sys/fs/cgroup{path}/{unified}", f"/sys/fs/cgroup/{unified}"]
                elif "memory" in controllers.split(","):
                    base = "/sys/fs/cgroup/memory"
                    paths += [f"{base}{path}/{legacy}", f"{base}/{legacy}"]
    except (OSError, ValueError):
        return []
    return paths


def memory_in_use() -> tuple[int | None, int | None]:
    """Return the bytes that our memory cgroup uses and may use at most; None stands for what is unknown or unlimited.

    A container has a cgroup of its own, so this is what the kernel counts before it kills.
    """
    used = _first_number(_of_memory_cgroup("memory.current", "memory.usage_in_bytes"))
    most = _first_number(_of_memory_cgroup("memory.max", "memory.limit_in_bytes"))
    return used, most if most is not None and most < 1 << 60 else None


def resident_memory(pid: int) -> int | None:
    """Return the bytes of memory that a process has resident, or None if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _first_number(paths: list[str]) -> int | None:
    for path in paths:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            return int(file.read())
    return None


def _memory_kills_in(path: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None
