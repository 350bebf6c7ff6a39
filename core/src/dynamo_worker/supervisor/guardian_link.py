"""The guardian as the supervisor sees it: the process, its channel, and what it has reported."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.channel import Channel
from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    import socket


class GuardianLink:
    """One guardian, which reports the worker's start, its end, and what was cleaned up.

    :param pid: its pid; our child.
    :param connection: our end of the channel. The guardian takes its closing for our death.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.channel = Channel(connection)
        #: Exit code of the guardian, once it has ended; negative: minus the signal.
        self.exit_code: int | None = None
        #: The worker, once it has started.
        self.worker: Process | None = None
        #: Why the worker could not be started.
        self.spawn_failure: str | None = None
        #: How the worker ended; negative: minus the signal.
        self.worker_exit_code: int | None = None
        #: What was cleaned up.
        self.report: dict[str, Any] | None = None

    @property
    def knows_the_end(self) -> bool:
        """Whether it has reported how the worker ended, or that none could be started."""
        return self.spawn_failure is not None or self.worker_exit_code is not None

    def receive(self) -> None:
        """Receive its reports."""
        for message in self.channel.receive():
            kind = message["type"]
            if kind == "spawned":
                self.worker = Process(message["pid"], message["start"])
            elif kind == "spawn_failed":
                self.spawn_failure = message["reason"]
            elif kind == "exited":
                self.worker_exit_code = message["code"]
            elif kind == "cleaned":
                self.report = message["report"]

    @property
    def hangs(self) -> bool:
        """Whether it is neither dead nor stopped: if it does not answer either, it hangs."""
        stat = linux.read_stat(self.pid) if self.exit_code is None else None
        return stat is not None and stat.state not in "TZX"

    def kill(self) -> None:
        """Send SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
