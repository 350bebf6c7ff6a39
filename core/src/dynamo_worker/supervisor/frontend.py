"""The frontend beside the worker. It also carries streams of other workers, so it may outlive ours for a while."""

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

#: Seconds after which a frontend without streams is gone; only a longer wait is logged.
_USUAL = 0.5

#: Seconds between two looks (SIGCHLD normally ends the pause sooner).
_INTERVAL = 0.05


def failure(code: int) -> str | None:
    """Describe how a frontend failed; None if it ended as it was asked to.

    :param code: its exit code; negative: minus the signal. SIGTERM ends one that has only just started.
    """
    if code in (0, -signal.SIGTERM):
        return None
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def report_end(run_dir: ledger.RunDir, pid: int, code: int, log: Log) -> str | None:
    """Log it if the child that ended is the frontend and has failed; return how, or None."""
    how = failure(code)
    recorded = ledger.frontend(run_dir) if how is not None else None
    if recorded is None or recorded[0].pid != pid:
        return None
    log.warning("The frontend ended before its streams did", pid=pid, how=how)
    return how


class Frontend:
    """A frontend that was asked to end. It refuses new connections and ends with its last stream.

    :param seconds: how long that may take.
    """

    def __init__(self, process: Process, seconds: float) -> None:
        self.process = process
        self._asked_at = time.monotonic()
        self._seconds = seconds
        linux.send_signal(process, signal.SIGCONT)  # a stopped process takes no other signal
        linux.send_signal(process, signal.SIGTERM)

    @classmethod
    def of(cls, run_dir: ledger.RunDir) -> Frontend | None:
        """Ask the frontend recorded in a run directory to end; return None if there is none."""
        recorded = ledger.frontend(run_dir)
        return cls(*recorded) if recorded is not None and linux.is_alive(recorded[0]) else None

    def wait(self, wait: Wait, deadline: Callable[[], float | None], log: Log) -> bool:
        """Wait until it has ended; return False if it has not by its deadline.

        :param deadline: returns when it has to be gone (monotonic), or None; may change during the wait.
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
