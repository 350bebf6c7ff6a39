"""Watch the rank processes of this host: after a kill their MPI futures stay pending for ever."""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import NamedTuple


class WorkerProcessIdentity(NamedTuple):
    """What tells one rank process from every other, later ones with its pid included."""

    rank: int
    pid: int
    start_time: int | None
    hostname: str
    pid_namespace: int | None


def _state_and_start_time(pid: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


def _pid_namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def capture_worker_process_identity(rank: int) -> WorkerProcessIdentity:
    """Describe the calling process as that rank."""
    found = _state_and_start_time(os.getpid())
    return WorkerProcessIdentity(rank, os.getpid(), found[1] if found else None, socket.gethostname(), _pid_namespace())


class WorkerProcessMonitor:
    """Holds a pidfd for every rank of this host and pid namespace; others are left out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poller = select.poll()
        self._watched: dict[int, WorkerProcessIdentity] = {}
        self._dead: WorkerProcessIdentity | None = None

    def register(self, identities: list[WorkerProcessIdentity]) -> None:
        """Watch these processes instead of any earlier ones."""
        host, namespace = socket.gethostname(), _pid_namespace()
        with self._lock:
            self._close()
            for identity in identities:
                if (identity.hostname, identity.pid_namespace) != (host, namespace):
                    continue
                try:
                    pidfd = os.pidfd_open(identity.pid)
                except ProcessLookupError:
                    self._dead = identity
                    continue
                found = _state_and_start_time(identity.pid)
                if found is None or found[0] == "Z" or found[1] != identity.start_time:
                    os.close(pidfd)
                    self._dead = identity
                    continue
                self._watched[pidfd] = identity
                self._poller.register(pidfd, select.POLLIN)

    def find_dead_worker(self) -> WorkerProcessIdentity | None:
        """Return the first rank known to be dead, None if all live."""
        with self._lock:
            if self._dead is None:
                for pidfd, _ in self._poller.poll(0):
                    self._dead = self._watched[pidfd]
                    break
            return self._dead

    def close(self) -> None:
        """Close every pidfd and forget what was found."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        for pidfd in self._watched:
            self._poller.unregister(pidfd)
            os.close(pidfd)
        self._watched.clear()
        self._dead = None
