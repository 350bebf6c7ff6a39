"""The supervisor's reactions to signals and deadlines, as a table of actions per phase and event."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from dynamo_worker.supervisor.cleaning_times import GUARDIAN_LIMIT
from dynamo_worker.supervisor.escalation import DUMP_TIME, Escalation, Event, Kill, KillCause, Phase, event_of
from dynamo_worker.supervisor.protocol import FORCED_STOP, KILL_RESERVE
from dynamo_worker.supervisor.verdict import signal_name

if TYPE_CHECKING:
    from dynamo_worker.supervisor.final_cleaning import FinalCleaning
    from dynamo_worker.supervisor.guardian_link import GuardianLink
    from dynamo_worker.supervisor.report import Log
    from dynamo_worker.supervisor.systemd import Systemd
    from dynamo_worker.supervisor.worker_channel import WorkerChannel
    from dynamo_worker.supervisor.worker_process import WorkerProcess
    from dynamo_worker.supervisor.worker_status import WorkerStatus

#: Seconds added to the time we request from systemd.
_EXTENSION_MARGIN = 3.0


_Action = Callable[["Reactions", int, float], None]


class Reactions:
    """Looks up the action for each signal and deadline in a table, and runs it.

    :param escalation: counts the signals.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        status: WorkerStatus,
        escalation: Escalation,
        *,
        control: WorkerChannel,
        guardian: GuardianLink,
        cleaning: FinalCleaning,
        systemd: Systemd,
        log: Log,
    ) -> None:
        self._worker = worker
        self._status = status
        self._escalation = escalation
        self._control = control
        self._guardian = guardian
        self._cleaning = cleaning
        self._systemd = systemd
        self._log = log
        self._stuck_at: float | None = None
        #: Seconds without a heartbeat when the worker was found unresponsive.
        self.stuck_for = 0.0
        self._told_of_closed_socket = False

    def on_signal(self, number: int) -> None:
        """Act on a signal, unless it counts as one with the previous signal."""
        now = time.monotonic()
        event = event_of(number)
        if event is Event.DUMP or self._escalation.counts(number, now):
            self._act(event, number, now)

    def _act(self, event: Event, number: int, now: float) -> None:
        """Run the action for an event.

        :param number: the signal; 0 for a deadline.
        """
        ended = self._worker.ended or self._cleaning.taken_over
        self._ACTIONS[self._escalation.phase(ended=ended), event](self, number, now)

    def _stop(self, number: int, now: float) -> None:
        """Pass the first signal on to the worker."""
        self._escalate(number, now, f"another one forces the stop within {FORCED_STOP:g} s")
        self._tell_worker(number, now)

    def _force(self, number: int, now: float) -> None:
        """Have the worker stop within seconds."""
        self._escalate(number, now, "another one kills at once")
        self._tell_worker(number, now)

    def _dump_and_force(self, number: int, now: float) -> None:
        """Have the worker print its stacks and stop within seconds."""
        self._dump_stack()
        self._force(number, now)

    def _kill_at_once(self, number: int, now: float) -> None:
        """Kill the worker and leave the cleaning to the guardian."""
        self._escalate(number, now, "killed now")
        self._kill(KillCause.FORCED)

    def _dump_and_kill(self, number: int, now: float) -> None:
        """Have the worker print its stacks before it is killed."""
        self._dump_stack()
        self._kill_at_once(number, now)

    def _limit_cleaning(self, number: int, now: float) -> None:
        """Start the termination grace period, which now limits the cleanup."""
        self._escalation.asked_at = now
        self._log_late_signal(number, "cleaning up; another one leaves at once")
        self._cleaning.update_deadlines()

    def _leave(self, number: int, _now: float) -> None:
        """Leave the cleanup to the guardian. The verdict does not change: the worker had already ended."""
        self._escalation.hurried = True
        self._log_late_signal(number, "leaving at once")
        self._cleaning.update_deadlines()

    def _log_late_signal(self, number: int, then: str) -> None:
        level = max(1, self._escalation.level)
        self._log.info("Received shutdown signal", signal=signal_name(number), stop_level=level, next=then)

    def _dump(self, _number: int, _now: float) -> None:
        """Have the worker print its stacks on request."""
        self._log.info("Stack dump requested", state=self._status.state)
        self._dump_stack()

    def _give_up(self, _number: int, now: float) -> None:
        """Give up on an unresponsive worker: withdraw it from discovery, dump its stacks, then kill it."""
        self._stuck_at = now
        self.stuck_for = now - self._status.last_beat
        self._guardian.channel.send("withdraw")
        dumped = self._dump_stack()
        self._log.error(
            "Worker event loop is unresponsive",
            no_heartbeat_s=self.stuck_for,
            state=self._status.state,
            in_flight=self._status.in_flight,
            stack_dump=dumped,
            next=f"killed in {DUMP_TIME:.0f} s",
        )

    def _kill_late(self, _number: int, _now: float) -> None:
        """Kill a worker that has not ended by its deadline."""
        kill = self._planned_kill()
        if kill is not None:
            self._kill(kill.cause)

    def _ignore(self, _number: int, _now: float) -> None:
        """Do nothing: the worker has ended or has been killed."""

    def _escalate(self, number: int, now: float, then: str) -> None:
        self._escalation.escalate(number, now)
        kill = self._next_kill()
        self._log.info(
            "Received shutdown signal",
            signal=signal_name(number),
            stop_level=self._escalation.level,
            next=then,
            deadline_s=max(0.0, kill.at - now) if kill is not None else None,
        )

    def _tell_worker(self, number: int, now: float) -> None:
        name = signal_name(number)
        if not self._control.stop(min(self._escalation.level, 2), name, now) and self._worker.process is not None:
            self._log.warning("Worker reads no control messages; signalling it directly", signal="SIGTERM")
            self._worker.signal(signal.SIGTERM)
        kill = self._next_kill()
        remaining = max(0.0, kill.at - now) if kill is not None else 0.0
        self._systemd.stopping(name, remaining + KILL_RESERVE + _EXTENSION_MARGIN)

    def _dump_stack(self) -> bool:
        """Have the worker print its threads' stacks (``faulthandler``); never with a signal that would end it."""
        if not self._worker.catches(signal.SIGUSR1):
            self._log.warning("No stack dump: the worker does not handle SIGUSR1")
            return False
        return self._worker.signal(signal.SIGUSR1)

    def _kill(self, cause: KillCause) -> None:
        status = self._status
        self._log.warning("Killing the worker", cause=cause, state=status.state, in_flight=status.in_flight)
        self._worker.kill(cause)

    #: The action for each phase (row) and event (column), as in s6-supervise.
    # fmt: off
    _ROWS: ClassVar[dict[Phase, tuple[_Action, ...]]] = {
        #                 STOP             QUIT             DUMP   UNRESPONSIVE  TIME_UP
        Phase.RUNNING:  (_stop,           _dump_and_force, _dump, _give_up, _kill_late),
        Phase.STOPPING: (_force,          _dump_and_force, _dump, _give_up, _kill_late),
        Phase.FORCING:  (_kill_at_once,   _dump_and_kill,  _dump, _give_up, _kill_late),
        Phase.KILLING:  (_kill_at_once,   _dump_and_kill,  _dump, _ignore,  _ignore),
        Phase.ENDED:    (_limit_cleaning, _limit_cleaning, _dump, _ignore,  _ignore),
        Phase.CLEANING: (_leave,          _leave,          _dump, _ignore,  _ignore),
        Phase.LEAVING:  (_leave,          _leave,          _dump, _ignore,  _ignore),
    }
    # fmt: on
    _ACTIONS: ClassVar[dict[tuple[Phase, Event], _Action]] = {
        (phase, event): action for phase, row in _ROWS.items() for event, action in zip(Event, row, strict=True)
    }

    # -- Timers -------------------------------------------------------------------------------------------------------

    def _next_kill(self) -> Kill | None:
        status = self._status
        return self._escalation.kill(
            status.grace_period, status.deadline, self._stuck_at, never_served=status.never_served
        )

    def _planned_kill(self) -> Kill | None:
        """Return when and why to kill the worker; None if it has been killed or has ended."""
        return None if self._worker.kill_cause is not None or self._worker.ended else self._next_kill()

    def _beat_due(self) -> float | None:
        """Return when the next heartbeat becomes overdue; None while heartbeats are not monitored."""
        if self._stuck_at is not None or self._worker.kill_cause is not None or self._worker.ended:
            return None  # it is ending anyway
        if self._control.closed:
            return None  # it has no means to send heartbeats
        return self._status.beat_due

    def _closing_due(self) -> float | None:
        """Return when to warn about a closed control socket; None if it is open, or after the warning.

        Ending closes it too: the wait lets the worker's end become known first.
        """
        if self._control.closed_at is None or self._told_of_closed_socket:
            return None
        return self._control.closed_at + GUARDIAN_LIMIT

    def next_timer(self) -> float | None:
        """Return when ``act_on_time`` should be called next (monotonic), or None."""
        kill = self._planned_kill()
        timers = [
            self._beat_due(),
            kill.at if kill is not None else None,
            self._closing_due(),
            self._systemd.due(self._status.state),
        ]
        return min((timer for timer in timers if timer is not None), default=None)

    def act_on_time(self) -> None:
        """Act on every deadline that has passed."""
        now = time.monotonic()
        beat_due = self._beat_due()
        if beat_due is not None and now >= beat_due:
            self._act(Event.UNRESPONSIVE, 0, now)
        kill = self._planned_kill()
        if kill is not None and now >= kill.at:
            self._act(Event.TIME_UP, 0, now)
        closing_due = self._closing_due()
        if closing_due is not None and now >= closing_due:
            self._told_of_closed_socket = True
            if self._worker.gone_at is None and self._worker.alive:
                self._log.warning("Worker closed its control socket; its state and heartbeat are unknown")
        self.tell_systemd(now)

    def tell_systemd(self, now: float) -> None:
        """Send systemd its keep-alives, except for an unresponsive worker."""
        self._systemd.tick(now, self._status.state, responsive=self._stuck_at is None)
