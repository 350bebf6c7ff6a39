"""Deadlines of the end, with times passed in."""

from __future__ import annotations

import signal

import pytest

from dynamo_worker.supervisor.cleaning_times import (
    AT_ONCE,
    GUARDIAN_LIMIT,
    LAST_CLEANING,
    SHORTEST_CLEANING,
    TAKE_OVER_RESERVE,
    cleaning_deadlines,
    given_up_at,
    guardian_patience,
)
from dynamo_worker.supervisor.cleanup import LIMIT
from dynamo_worker.supervisor.escalation import Escalation
from dynamo_worker.supervisor.protocol import DEATH_LIMIT, FORCED_STOP

#: The first signal came at 100, the termination grace period ends at 130.
GRACE = 30.0
LATEST = 130.0 - TAKE_OVER_RESERVE
FRONTEND = TAKE_OVER_RESERVE + SHORTEST_CLEANING


def after(*times):
    escalation = Escalation()
    for at in times:
        escalation.escalate(signal.SIGTERM, at)
    return escalation


def late(asked_at):
    """Return the escalation after a first signal that came once the worker had ended."""
    escalation = Escalation()
    escalation.asked_at = asked_at
    return escalation


@pytest.mark.parametrize(
    ("escalation", "gone_at", "now", "ours", "guardian", "frontend"),
    [
        (after(), 100.0, 100.0, 100.0 + LIMIT, 100.0 + LIMIT, 130.0 - FRONTEND),
        (after(100.0), 105.0, 105.0, 105.0 + LIMIT, 105.0 + LIMIT, 130.0 - FRONTEND),
        (after(100.0), 120.0, 120.0, LATEST, LATEST, 130.0 - FRONTEND),
        (after(100.0), 140.0, 140.0, 140.5, 140.5, 130.0 - FRONTEND),
        (late(105.0), 100.0, 105.0, 105.0 + LIMIT, 105.0 + LIMIT, 130.0 - FRONTEND),
        (after(100.0, 104.0), 105.0, 105.0, 105.0 + LIMIT, 105.0 + LIMIT, 104.0 + FORCED_STOP),
        (after(100.0, 104.0, 105.0), 105.0, 105.0, 105.0 + AT_ONCE - 0.1, 105.0 + LAST_CLEANING, 105.0),
    ],
    ids=["by itself", "stop", "late", "too late", "signal after the end", "second signal", "third signal"],
)
def test_cleaning(escalation, gone_at, now, ours, guardian, frontend):
    deadlines = cleaning_deadlines(escalation, GRACE, gone_at, now, taken_over=False)
    assert deadlines == (ours, guardian, frontend)


def test_a_supervisor_that_took_over_gets_the_time_of_the_last_cleaning():
    deadlines = cleaning_deadlines(after(100.0, 101.0, 102.0), GRACE, 105.0, 105.0, taken_over=True)
    assert deadlines.ours == 105.0 + LAST_CLEANING


@pytest.mark.parametrize(("signals", "seconds"), [(0, GUARDIAN_LIMIT), (2, GUARDIAN_LIMIT), (3, AT_ONCE / 3)])
def test_patience_with_the_guardian(signals, seconds):
    assert guardian_patience(after(*[100.0] * signals)) == seconds


@pytest.mark.parametrize(
    ("signals", "killed_at", "limit"),
    [
        ((), 100.0, 100.0 + DEATH_LIMIT),
        ((100.0,), 110.0, 110.0 + DEATH_LIMIT),
        ((100.0,), 128.0, LATEST),
        ((100.0,), 129.5, 129.5 + GUARDIAN_LIMIT),
        ((100.0, 101.0), 103.0, 103.0 + GUARDIAN_LIMIT),
        ((100.0, 101.0, 102.0), 102.0, 102.0 + GUARDIAN_LIMIT),
    ],
)
def test_a_worker_that_survives(signals, killed_at, limit):
    assert given_up_at(after(*signals), GRACE, killed_at, started=True) == limit


@pytest.mark.parametrize(("signals", "seconds"), [(1, GUARDIAN_LIMIT), (3, AT_ONCE / 3)])
def test_a_guardian_that_starts_no_worker(signals, seconds):
    assert given_up_at(after(*[100.0] * signals), GRACE, 102.0, started=False) == 102.0 + seconds
