"""The frontend beside the worker: it carries streams of other workers too, so it may outlive its own for a while."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import ledger, linux

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.supervisor.linux import Process
    from dynamo_worker.supervisor.process_tree import Wait
    from dynamo_worker.supervisor.report import Log

#: A frontend without streams is gone by then; only of one that takes longer the log should tell.
_USUAL = 0.5

#: Longest pause between two looks (normally SIGCHLD ends it sooner).
_INTERVAL = 0.05


def failure(code: int) -> str | None:
    """Return in words how a frontend failed that has ended with this code; None if it did as it was asked.

    :param code: negative: minus the signal. SIGTERM ends one that has only just started.
    """
    if code in (0, -signal.SIGTERM):
        return None
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def report_end(run_dir: ledger.RunDir, pid: int, code: int, log: Log) -> str | None:
    """Log that the frontend beside the worker has failed, if that is the child that has ended; return how, or None."""
    how = failure(code)
    recorded = ledger.frontend(run_dir) if how is not None else None
    if recorded is None or recorded[0].pid != pid:
        return None
    log.warning("The frontend ended before its streams did", pid=pid, how=how)
    return how


class Frontend:
    """A frontend that was asked to end: it takes no new connections and ends with its last stream.

    :param seconds: how long it may take.
    """

    def __init__(self, process: Process, seconds: float) -> None:
        self.process = process
        self._asked_at = time.monotonic()
        self._seconds = seconds
        linux.send_signal(process, signal.SIGCONT)  # a stopped process hears nothing else
        linux.send_signal(process, signal.SIGTERM)

    @classmethod
    def of(cls, run_dir: ledger.RunDir) -> Frontend | None:
        """Ask the frontend that a run directory records to end, if there is one."""
        recorded = ledger.frontend(run_dir)
        return cls(*recorded) if recorded is not None and linux.is_alive(recorded[0]) else None

    def wait(self, wait: Wait, deadline: Callable[[], float | None], log: Log) -> bool:
        """Wait until it has ended; return False if its time is up before.

        :param deadline: when it has to be gone at the latest, if anybody says so; it may move while this waits.
        """
        told = False
        while linux.is_alive(self.process):
            now = time.monotonic()
            said = deadline()
            limit = self._asked_at + self._seconds
            limit = limit if said is None else min(limit, said)
            if now >= limit:
                log.warning("Frontend still has open streams at its deadline; killing it", pid=self.process.pid)
                return False
            if not told and now >= self._asked_at + _USUAL:
                told = True
                log.info("Frontend is finishing its streams", pid=self.process.pid, limit_s=limit - now)
            wait(min(_INTERVAL, limit - now), None)
        return True
