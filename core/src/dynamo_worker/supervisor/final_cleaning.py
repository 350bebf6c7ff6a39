"""The supervisor's part in cleaning up: sets the deadlines, waits for the guardian, or takes over from it."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import ledger, linux, process_tree
from dynamo_worker.supervisor.cleaning_times import GUARDIAN_LIMIT, LATENESS, cleaning_deadlines
from dynamo_worker.supervisor.cleanup import Cleanup
from dynamo_worker.supervisor.verdict import signal_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dynamo_worker.supervisor.escalation import Escalation
    from dynamo_worker.supervisor.guardian_link import GuardianLink
    from dynamo_worker.supervisor.linux import Process
    from dynamo_worker.supervisor.loop import Loop
    from dynamo_worker.supervisor.process_tree import Wait
    from dynamo_worker.supervisor.relay import Relay
    from dynamo_worker.supervisor.report import Log
    from dynamo_worker.supervisor.run_directory import RunDirectory
    from dynamo_worker.supervisor.worker_process import WorkerProcess
    from dynamo_worker.supervisor.worker_status import WorkerStatus

#: Seconds the guardian gets to end after its report.
_EXIT_LIMIT = 0.2


class FinalCleaning:
    """Makes sure that the worker is cleaned up after, by the guardian or by us.

    :param strangers: our children that do not belong to the worker's tree.
    :param wait: handles events for a number of seconds.
    """

    def __init__(
        self,
        guardian: GuardianLink,
        worker: WorkerProcess,
        status: WorkerStatus,
        escalation: Escalation,
        *,
        run_directory: RunDirectory,
        strangers: Collection[Process],
        relay: Relay,
        loop: Loop,
        wait: Wait,
        log: Log,
    ) -> None:
        self._guardian = guardian
        self._worker = worker
        self._status = status
        self._escalation = escalation
        self._run_directory = run_directory
        self._strangers = strangers
        self._relay = relay
        self._loop = loop
        self._wait = wait
        self._log = log
        self._cleanup: Cleanup | None = None
        self._gone_at: float | None = None
        self._deadline = 0.0
        self._frontend_deadline = 0.0
        #: Whether the guardian ended before it could tell how the worker ended.
        self.guardian_lost = False
        #: How the frontend failed, if it did.
        self.frontend_failure: str | None = None

    @property
    def taken_over(self) -> bool:
        """Whether we clean up ourselves."""
        return self._cleanup is not None

    def has_killed(self, pid: int) -> bool:
        """Return whether a process was killed while we cleaned up."""
        return self._cleanup is not None and self._cleanup.has_killed(pid)

    def begin(self, gone_at: float) -> None:
        """Start the clock of the cleanup.

        :param gone_at: when the worker ended (monotonic).
        """
        self._gone_at = gone_at

    def update_deadlines(self) -> None:
        """Set the deadlines of the process that cleans up. Does nothing before ``begin``; call it again after that."""
        if self._gone_at is None:
            return
        now, grace_period = time.monotonic(), self._status.grace_period
        deadlines = cleaning_deadlines(self._escalation, grace_period, self._gone_at, now, taken_over=self.taken_over)
        self._deadline, self._frontend_deadline = deadlines.ours, deadlines.frontend
        self._guardian.channel.send("deadline", at=deadlines.guardian, frontend=deadlines.frontend)
        if self._cleanup is not None:
            self._cleanup.deadline = deadlines.ours
            self._cleanup.frontend_deadline = deadlines.frontend

    def await_report(self, pump: Callable[[float], None]) -> dict[str, Any] | None:
        """Wait for the guardian's report while it lives and is within its time limit.

        :param pump: handles events until a point in time (monotonic), at most once.
        :return: what was cleaned up; empty if the guardian will finish without us; None if it failed.
        """
        guardian, patience = self._guardian, 0.0
        while guardian.report is None and guardian.exit_code is None:
            limit = self._deadline + (GUARDIAN_LIMIT if self._escalation.asked_at is None else LATENESS)
            if self._frontend_lives():
                patience = min(time.monotonic() + GUARDIAN_LIMIT, self._frontend_deadline) + GUARDIAN_LIMIT
            if not self._escalation.hurried:
                limit = max(limit, patience)
            if time.monotonic() >= limit:
                break
            pump(limit)
        if guardian.report is None and guardian.exit_code is None:
            return {} if self._escalation.hurried else None
        while guardian.report is not None and guardian.exit_code is None:  # it ends right after its report
            limit = time.monotonic() + _EXIT_LIMIT
            self._wait(_EXIT_LIMIT, None)
            if time.monotonic() >= limit:
                break
        return guardian.report

    def _frontend_lives(self) -> bool:
        """Return whether the guardian is still waiting for a frontend that is within its deadline."""
        if time.monotonic() >= self._frontend_deadline:
            return False
        recorded = ledger.frontend(self._run_directory.descriptor)
        return recorded is not None and linux.is_alive(recorded[0])

    def take_over(self) -> dict[str, Any]:
        """Clean up in the place of a guardian that is dead or does not answer; return what was cleaned up."""
        guardian, worker = self._guardian, self._worker
        hangs = guardian.hangs  # read before the kill
        self.guardian_lost = guardian.exit_code is not None and not guardian.knows_the_end
        self._report_takeover()
        if guardian.exit_code is None:
            guardian.kill()
        if worker.exit_code is None:
            worker.signal(signal.SIGKILL)  # the kernel does that, too
        self._relay.start(self._loop)  # the worker's last words
        self._cleanup = Cleanup(
            self._run_directory,
            find=lambda: process_tree.descendants(os.getpid(), self._strangers),
            reap=self._loop.reap,
            wait=self._wait,
            log=self._log,
            worker=worker.pid,
            rough=hangs,
        )
        self.update_deadlines()
        report = {**self._cleanup.run(), "frontend": self.frontend_failure}
        self._relay.finish()
        return report

    def _report_takeover(self) -> None:
        code = self._guardian.exit_code
        if code is not None:
            ended = f"killed by {signal_name(-code)}" if code < 0 else "ended"
            self._log.error("Guardian died; supervisor is killing the worker", guardian=ended)
        elif self._worker.process is not None and self._worker.alive:
            stuck = process_tree.describe(self._worker.process)
            self._log.error("Worker survived SIGKILL; supervisor takes over", worker=stuck)
        else:
            self._log.error("Guardian is not responding; supervisor takes over", pid=self._guardian.pid)
