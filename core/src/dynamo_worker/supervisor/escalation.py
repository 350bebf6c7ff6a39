"""Escalation of stop signals: how urgent a stop is, and when to kill the worker. No I/O; callers pass the time."""

from __future__ import annotations

import enum
import signal
from typing import Final, NamedTuple

from dynamo_worker.supervisor.protocol import FORCED_STOP, KILL_RESERVE, SIGNAL_DEBOUNCE

#: Seconds an unresponsive worker gets to print its stacks.
DUMP_TIME: Final = 1.0


class Phase(enum.Enum):
    """How far the shutdown of a worker has progressed."""

    #: The worker runs; no stop was requested.
    RUNNING = enum.auto()
    #: One signal: the worker stops gracefully.
    STOPPING = enum.auto()
    #: Two signals: the worker stops within ``FORCED_STOP`` seconds.
    FORCING = enum.auto()
    #: Three signals: the worker is killed.
    KILLING = enum.auto()
    #: The worker ended by itself; cleanup has no deadline but its own.
    ENDED = enum.auto()
    #: The worker ended and a stop was requested: cleanup has to fit into the termination grace period.
    CLEANING = enum.auto()
    #: The worker ended and another signal came: we exit and leave the cleanup to the guardian.
    LEAVING = enum.auto()


class Event(enum.Enum):
    """What makes the supervisor act on the worker."""

    #: SIGTERM, SIGINT or SIGHUP.
    STOP = enum.auto()
    #: SIGQUIT: stop at once, and print the stacks first.
    QUIT = enum.auto()
    #: SIGUSR1: print the stacks.
    DUMP = enum.auto()
    #: The worker's heartbeat is overdue.
    UNRESPONSIVE = enum.auto()
    #: The worker still runs at its deadline.
    TIME_UP = enum.auto()


class KillCause(str, enum.Enum):
    """Why the supervisor killed the worker. The value is what logs show."""

    #: Its event loop was unresponsive.
    STUCK = "stuck"
    #: A second or third signal.
    FORCED = "forced"
    #: It was stopped during its start and did not end in time.
    START = "start"
    #: It did not stop by its deadline.
    DEADLINE = "deadline"

    def __str__(self) -> str:
        return self.value


class Kill(NamedTuple):
    """A planned kill."""

    #: When (monotonic).
    at: float
    cause: KillCause


_PHASES: Final = (Phase.RUNNING, Phase.STOPPING, Phase.FORCING, Phase.KILLING)


def event_of(number: int) -> Event:
    """Return the event for a signal."""
    return {signal.SIGUSR1: Event.DUMP, signal.SIGQUIT: Event.QUIT}.get(signal.Signals(number), Event.STOP)


class Escalation:
    """Counts stop signals and derives the worker's deadline from them."""

    def __init__(self) -> None:
        #: Signals that counted while the worker ran.
        self.level = 0
        #: The last of them.
        self.last_signal = 0
        #: When the first signal came, even if the worker had already ended (monotonic).
        self.asked_at: float | None = None
        #: When the second one came (monotonic).
        self.forced_at = 0.0
        #: Whether to exit as soon as possible and leave the cleanup to the guardian.
        self.hurried = False
        self._counted, self._counted_at = 0, float("-inf")

    def phase(self, *, ended: bool) -> Phase:
        """Return the current phase.

        :param ended: whether the worker has ended.
        """
        if not ended:
            return _PHASES[min(self.level, 3)]
        if self.hurried:
            return Phase.LEAVING
        return Phase.ENDED if self.asked_at is None else Phase.CLEANING

    def counts(self, number: int, now: float) -> bool:
        """Return whether a signal counts as a new one (see ``SIGNAL_DEBOUNCE``)."""
        if now < self._counted_at + SIGNAL_DEBOUNCE and (number != signal.SIGQUIT or number == self._counted):
            return False
        self._counted, self._counted_at = number, now
        return True

    def escalate(self, number: int, now: float) -> None:
        """Count a signal that came while the worker ran."""
        self.last_signal = number
        self.level = max(2, self.level + 1) if number == signal.SIGQUIT else self.level + 1
        if self.asked_at is None:
            self.asked_at = now
        if self.level == 2:
            self.forced_at = now
        self.hurried = self.hurried or self.level >= 3

    def kill(
        self, grace_period: float, announced: float | None, stuck_at: float | None, *, never_served: bool
    ) -> Kill | None:
        """Return when to kill the worker unless it ends before, and why; None: never.

        :param grace_period: the termination grace period in seconds.
        :param announced: the deadline that the worker announced (monotonic).
        :param stuck_at: when the worker was found unresponsive (monotonic).
        :param never_served: whether it has not served yet: no request needs its time.
        """
        if self.level >= 3 and self.asked_at is not None:
            return Kill(self.asked_at, KillCause.FORCED)
        if stuck_at is not None:
            return Kill(stuck_at + DUMP_TIME, KillCause.STUCK)
        if self.level == 2:
            return Kill(self.forced_at + FORCED_STOP, KillCause.FORCED)
        if self.level == 1 and self.asked_at is not None:
            if never_served:
                return Kill(self.asked_at + FORCED_STOP, KillCause.START)
            last = self.asked_at + grace_period - KILL_RESERVE
            return Kill(last if announced is None else min(announced, last), KillCause.DEADLINE)
        return Kill(announced, KillCause.DEADLINE) if announced is not None else None
