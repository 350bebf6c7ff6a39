"""Processes of the benchmarks: how they are started, watched, measured and ended; all of Linux' `/proc`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import site
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Adopt the orphans of everything started here, so that leftovers are seen and can be ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def raise_file_limit() -> int:
    """Raise the limit of open files, for this process and its children, to what is allowed; return it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def loopback_environment(discovery: Path, temporary: Path, **additions: str) -> dict[str, str]:
    """Return an environment in which Dynamo stays on the loopback interface and in private directories.

    :param discovery: directory of the file discovery; the home directory is made beside it.
    :param temporary: TMPDIR.
    :param additions: further variables.
    """
    home = discovery.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DYN_", "DYNAMO_", "ETCD_", "NATS_")) and name != "PYTHONPATH"
    }
    environment.update(
        DYN_TCP_RPC_HOST="127.0.0.1",
        DYN_TCP_RESPONSE_STREAM_HOST="127.0.0.1",
        DYN_EVENT_PLANE_HOST="127.0.0.1",
        DYN_SYSTEM_HOST="127.0.0.1",
        DYN_DISCOVERY_BACKEND="file",
        DYN_FILE_KV=str(discovery),
        DYN_SELF_HOST_METADATA="0",
        DYN_LOG="warn",
        HF_HUB_OFFLINE="1",
        TMPDIR=str(temporary),
        # The runtime keeps model cards below the home directory; Python finds the user's own packages there.
        HOME=str(home),
        XDG_CACHE_HOME=str(home / ".cache"),
        PYTHONUSERBASE=site.getuserbase(),
        PYTHONUNBUFFERED="1",
    )
    environment.update(additions)
    return environment


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process with all its threads, also of those that have ended."""
    try:
        # The CPU clock of another process (clock_getcpuclockid): nanoseconds, where /proc/PID/stat has ticks of 10 ms.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        fields = _stat_fields(pid)
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_bytes(pid: int) -> int:
    """Return the proportional set size: private memory and this process' share of what is shared."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no Pss of process {pid}")


def command_line(pid: int) -> list[str]:
    """Return the command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []


def children(pid: int) -> list[int]:
    """Return the children of all threads of a process, oldest first."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process that have not ended, parents before children."""
    found: list[int] = []
    for child in children(pid):
        if is_alive(child):
            found.append(child)
        found += descendants(child)
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return _stat_fields(pid)[0] not in ("Z", "X")
    except OSError:
        return False


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


class TreeWatch:
    """Waits for the end of a set of processes, pinned now by pidfd, and knows when the last one was gone."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pidfds: dict[int, int] = {}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._pidfds[os.pidfd_open(pid)] = pid
        self.gone_at: float | None = None

    def wait(self, timeout: float) -> list[int]:
        """Wait until all are gone; return the pids that are still there after the timeout."""
        deadline = time.monotonic() + timeout
        poller = select.poll()
        for pidfd in self._pidfds:
            poller.register(pidfd, select.POLLIN)
        while self._pidfds:
            ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1e3)
            if not ready:
                break
            for pidfd, _ in ready:
                poller.unregister(pidfd)
                os.close(pidfd)
                del self._pidfds[pidfd]
        if not self._pidfds:
            self.gone_at = time.monotonic()
        return sorted(self._pidfds.values())

    def kill(self) -> None:
        """Kill what is left; pinned, so no other process can be hit."""
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the processes."""
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds.clear()


class Program:
    """A started program. A thread waits for its end, so that the time of the end is exact.

    :param name: what it is called in messages; also the name of its log.
    :param command: its command line.
    :param environment: its whole environment.
    :param log: file for its stdout and stderr.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.ended_at: float | None = None
        self.code: int | None = None
        self._ended = threading.Event()
        with log.open("ab") as output:
            # Kept logs may go on where those of an earlier run end.
            self._log_begins = output.tell()
            self.started_at = time.monotonic()
            # Every program in a session of its own, as in containers: Linux gives each session its fair share of the
            # processors (autogroup), and a worker that shares one with the client costs a third less CPU per token.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                # `python -m` looks for modules where it is started, and benchmarks are named like engines.
                cwd=log.parent,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._thread = threading.Thread(target=self._wait, name=f"wait for {name}", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        # Popen.wait() reaps the process; send_signal() below looks at the same lock and never signals a reaped pid.
        code = self._process.wait()
        self.ended_at = time.monotonic()
        self.code = 128 - code if code < 0 else code
        self._ended.set()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._ended.is_set()

    def tree(self) -> list[int]:
        """Return the pids of the program and all its descendants that are alive."""
        return [self.pid, *descendants(self.pid)] if self.running else []

    def signal(self, number: int) -> float:
        """Send a signal to the program; return when that was."""
        at = time.monotonic()
        if self.running:
            self._process.send_signal(number)
        return at

    def wait(self, timeout: float) -> int | None:
        """Wait for the end and return the exit code (128 + n for signal n); None when it still runs."""
        self._ended.wait(timeout)
        return self.code

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of its log."""
        text = self.log.read_bytes()[self._log_begins :].decode("utf-8", "replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def pin_and_signal(pid: int, number: int) -> None:
    """Send a signal to a process; to nobody when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def end_all(pids: Iterable[int], timeout: float = 5.0) -> None:
    """Kill processes and wait for their end."""
    watch = TreeWatch(pids)
    watch.kill()
    watch.wait(timeout)
    watch.close()


def reap_orphans(known: Iterable[int]) -> list[int]:
    """Reap adopted orphans that have ended; return those that live, with their descendants.

    :param known: children that are no orphans.
    """
    mine = set(known)
    living: list[int] = []
    for pid in children(os.getpid()):
        if pid in mine:
            continue
        if is_alive(pid):
            living += [pid, *descendants(pid)]
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return living
