"""When who has to be done once the worker ends. No I/O: every point in time is passed in, and monotonic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from dynamo_worker.supervisor.cleanup import LIMIT
from dynamo_worker.supervisor.protocol import DEATH_LIMIT, FORCED_STOP

if TYPE_CHECKING:
    from dynamo_worker.supervisor.escalation import Escalation

#: Seconds that are left of the whole process after the third signal.
AT_ONCE: Final = 0.35

#: Seconds the guardian may take to say that the worker is gone, and to report when its time for cleaning is over.
GUARDIAN_LIMIT: Final = 1.0

#: The same for the report while the termination grace period runs out.
LATENESS: Final = 0.2

#: Seconds that cleaning gets after a third signal from the last who can do it: the guardian, or us in its place.
LAST_CLEANING: Final = 2.0

#: Part of the grace period in which the supervisor could still clean up itself, and the least that takes.
TAKE_OVER_RESERVE: Final = 1.0
SHORTEST_CLEANING: Final = 0.5


class CleaningDeadlines(NamedTuple):
    """When who has to be done."""

    #: We: with cleaning, or with waiting for the guardian.
    ours: float
    guardian: float
    #: A frontend that still carries streams.
    frontend: float


def cleaning_deadlines(
    escalation: Escalation, grace_period: float, gone_at: float, now: float, *, taken_over: bool
) -> CleaningDeadlines:
    """Return the deadlines of cleaning: before the termination grace period ends, if it is running.

    :param gone_at: when the worker ended.
    :param taken_over: whether we clean up ourselves.
    """
    ours = now + LIMIT
    if escalation.asked_at is not None:
        latest = escalation.asked_at + grace_period - TAKE_OVER_RESERVE
        ours = max(now + SHORTEST_CLEANING, min(ours, latest))
    guardian = ours
    if escalation.hurried:  # the guardian goes on without us, but nobody would after us
        guardian = now + LAST_CLEANING
        ours = guardian if taken_over else now + AT_ONCE - 0.1
    return CleaningDeadlines(ours, guardian, _frontend_deadline(escalation, grace_period, gone_at, now))


def _frontend_deadline(escalation: Escalation, grace_period: float, gone_at: float, now: float) -> float:
    """Return when the frontend has to be gone.

    It gets what is left of the termination grace period, or a whole one if the worker ended by itself.
    """
    if escalation.hurried:
        return now
    if escalation.level >= 2:
        return escalation.forced_at + FORCED_STOP
    since = gone_at if escalation.asked_at is None else min(escalation.asked_at, gone_at)
    return since + grace_period - TAKE_OVER_RESERVE - SHORTEST_CLEANING


def guardian_patience(escalation: Escalation) -> float:
    """Return how many seconds the guardian may take to say that the worker is gone."""
    return AT_ONCE / 3 if escalation.hurried else GUARDIAN_LIMIT


def given_up_at(escalation: Escalation, grace_period: float, killed_at: float, *, started: bool) -> float:
    """Return when to stop waiting for the end of a worker that was killed.

    The kernel gets its time, but not the time that is left for cleaning.

    :param started: whether there is a worker; else the guardian has not started one yet.
    """
    if not started:
        return killed_at + guardian_patience(escalation)
    limit = killed_at + DEATH_LIMIT
    if escalation.level >= 2:
        limit = killed_at
    elif escalation.asked_at is not None:
        limit = min(limit, escalation.asked_at + grace_period - TAKE_OVER_RESERVE)
    return max(limit, killed_at + GUARDIAN_LIMIT)
