"""The deadlines of cleaning up after a worker. No I/O; callers pass the time, which is monotonic throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from dynamo_worker.supervisor.cleanup import LIMIT
from dynamo_worker.supervisor.protocol import DEATH_LIMIT, FORCED_STOP

if TYPE_CHECKING:
    from dynamo_worker.supervisor.escalation import Escalation

#: Seconds from the third signal to our exit.
AT_ONCE: Final = 0.35

#: Seconds the guardian may take to report the worker's end, and to report after its deadline for cleaning up.
GUARDIAN_LIMIT: Final = 1.0

#: The same for the report while the termination grace period runs out.
LATENESS: Final = 0.2

#: Seconds for cleaning up after a third signal: by the guardian, or by us once it is gone.
LAST_CLEANING: Final = 2.0

#: Seconds of the grace period reserved for the supervisor to take over the cleanup, and the least a cleanup gets.
TAKE_OVER_RESERVE: Final = 1.0
SHORTEST_CLEANING: Final = 0.5


class CleaningDeadlines(NamedTuple):
    """When each process has to be done."""

    #: The supervisor: with cleaning up, or with waiting for the guardian.
    ours: float
    guardian: float
    #: A frontend that still carries streams.
    frontend: float


def cleaning_deadlines(
    escalation: Escalation, grace_period: float, gone_at: float, now: float, *, taken_over: bool
) -> CleaningDeadlines:
    """Return the deadlines, which lie within the termination grace period if that is running.

    :param gone_at: when the worker ended.
    :param taken_over: whether we clean up ourselves.
    """
    ours = now + LIMIT
    if escalation.asked_at is not None:
        latest = escalation.asked_at + grace_period - TAKE_OVER_RESERVE
        ours = max(now + SHORTEST_CLEANING, min(ours, latest))
    guardian = ours
    if escalation.hurried:  # the guardian continues without us, but after a takeover there is no other process
        guardian = now + LAST_CLEANING
        ours = guardian if taken_over else now + AT_ONCE - 0.1
    return CleaningDeadlines(ours, guardian, _frontend_deadline(escalation, grace_period, gone_at, now))


def _frontend_deadline(escalation: Escalation, grace_period: float, gone_at: float, now: float) -> float:
    """Return the frontend's deadline.

    It gets what is left of the termination grace period, or a whole one if the worker ended by itself.
    """
    if escalation.hurried:
        return now
    if escalation.level >= 2:
        return escalation.forced_at + FORCED_STOP
    since = gone_at if escalation.asked_at is None else min(escalation.asked_at, gone_at)
    return since + grace_period - TAKE_OVER_RESERVE - SHORTEST_CLEANING


def guardian_patience(escalation: Escalation) -> float:
    """Return how many seconds the guardian may take to report the worker's end."""
    return AT_ONCE / 3 if escalation.hurried else GUARDIAN_LIMIT


def given_up_at(escalation: Escalation, grace_period: float, killed_at: float, *, started: bool) -> float:
    """Return when to stop waiting for a killed worker to end.

    The kernel gets its time, but not the time that is left for cleaning.

    :param started: whether the guardian has started the worker.
    """
    if not started:
        return killed_at + guardian_patience(escalation)
    limit = killed_at + DEATH_LIMIT
    if escalation.level >= 2:
        limit = killed_at
    elif escalation.asked_at is not None:
        limit = min(limit, escalation.asked_at + grace_period - TAKE_OVER_RESERVE)
    return max(limit, killed_at + GUARDIAN_LIMIT)
