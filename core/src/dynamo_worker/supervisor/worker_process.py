"""The worker's process, which the supervisor watches itself in case the guardian does not answer."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import linux

if TYPE_CHECKING:
    from dynamo_worker.supervisor.escalation import KillCause
    from dynamo_worker.supervisor.linux import Process
    from dynamo_worker.supervisor.loop import Loop


class WorkerProcess:
    """Signals the worker's process and notes its end. Until it has started, signals are not sent."""

    def __init__(self) -> None:
        #: None until the guardian has started it.
        self.process: Process | None = None
        #: Negative: minus the signal that killed it; None until it is known.
        self.exit_code: int | None = None
        #: When we saw it dead (monotonic).
        self.gone_at: float | None = None
        #: Why it was killed last, and when first (monotonic).
        self.kill_cause: KillCause | None = None
        self.killed_at: float | None = None
        self._watch: int | None = None

    @property
    def pid(self) -> int | None:
        """Its pid, once it has started."""
        return self.process.pid if self.process is not None else None

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        return self.exit_code is not None or self.gone_at is not None

    @property
    def alive(self) -> bool:
        """Whether it runs now."""
        return self.process is not None and linux.is_alive(self.process)

    def started(self, process: Process, loop: Loop) -> None:
        """Record the process, and watch for its end ourselves, in case the guardian is stopped."""
        self.process = process
        if self.kill_cause is not None:
            self.signal(signal.SIGKILL)
        try:
            self._watch = os.pidfd_open(process.pid)
        except OSError:
            return
        if self.alive:
            loop.add(self._watch, lambda: self._on_end(loop))
        else:
            self._on_end(loop)

    def _on_end(self, loop: Loop) -> None:
        if self._watch is not None:
            loop.remove(self._watch)
            os.close(self._watch)
            self._watch = None
        if self.gone_at is None:
            self.gone_at = time.monotonic()

    def kill(self, cause: KillCause) -> None:
        """Send SIGKILL, now or as soon as it has started."""
        self.kill_cause = cause
        self.killed_at = self.killed_at or time.monotonic()
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> bool:
        """Send a signal; return whether the process existed."""
        return self.process is not None and linux.send_signal(self.process, number)

    def catches(self, number: int) -> bool:
        """Return whether it has installed a handler for a signal."""
        return self.process is not None and linux.catches(self.process.pid, number)
