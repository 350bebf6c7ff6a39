"""Sequences of signals at given times: the stop level, and when the worker is killed."""

from __future__ import annotations

import signal

import pytest

from dynamo_worker.supervisor.escalation import DUMP_TIME, Escalation, Event, Kill, KillCause, Phase, event_of
from dynamo_worker.supervisor.protocol import FORCED_STOP, KILL_RESERVE, SIGNAL_DEBOUNCE

TERM, INT, HUP, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
GRACE = 30.0


def after(*signals):
    """Return the escalation after these signals, ten seconds apart, the first at 100."""
    escalation = Escalation()
    for index, number in enumerate(signals):
        escalation.escalate(number, 100.0 + 10 * index)
    return escalation


@pytest.mark.parametrize(
    ("number", "event"),
    [
        (TERM, Event.STOP),
        (INT, Event.STOP),
        (HUP, Event.STOP),
        (QUIT, Event.QUIT),
        (signal.SIGUSR1, Event.DUMP),
    ],
)
def test_events(number, event):
    assert event_of(number) is event


@pytest.mark.parametrize(
    ("signals", "level", "alive", "ended"),
    [
        ((), 0, Phase.RUNNING, Phase.ENDED),
        ((TERM,), 1, Phase.STOPPING, Phase.CLEANING),
        ((TERM, INT), 2, Phase.FORCING, Phase.CLEANING),
        ((QUIT,), 2, Phase.FORCING, Phase.CLEANING),
        ((TERM, QUIT), 2, Phase.FORCING, Phase.CLEANING),
        ((TERM, INT, HUP), 3, Phase.KILLING, Phase.LEAVING),
        ((QUIT, TERM), 3, Phase.KILLING, Phase.LEAVING),
        ((QUIT, QUIT), 3, Phase.KILLING, Phase.LEAVING),
        ((TERM, INT, HUP, TERM), 4, Phase.KILLING, Phase.LEAVING),
    ],
)
def test_phases(signals, level, alive, ended):
    escalation = after(*signals)
    assert escalation.level == level
    assert escalation.phase(ended=False) is alive
    assert escalation.phase(ended=True) is ended
    assert escalation.last_signal == (signals[-1] if signals else 0)
    assert escalation.asked_at == (100.0 if signals else None)


def test_every_phase_is_reachable():
    seen = {after(*[TERM] * count).phase(ended=ended) for count in range(4) for ended in (False, True)}
    assert seen == set(Phase)


@pytest.mark.parametrize(
    ("signals", "counted"),
    [
        ([(TERM, 0.0), (HUP, 0.05)], [TERM]),  # systemd with SendSIGHUP=yes
        ([(INT, 0.0), (INT, 0.09), (INT, 0.18)], [INT, INT]),
        ([(TERM, 0.0), (TERM, SIGNAL_DEBOUNCE)], [TERM, TERM]),
        ([(TERM, 0.0), (QUIT, 0.01)], [TERM, QUIT]),  # it asks for something else
        ([(QUIT, 0.0), (QUIT, 0.01)], [QUIT]),
        ([(TERM, 0.0), (QUIT, 0.01), (QUIT, 0.02)], [TERM, QUIT]),
        ([(QUIT, 0.0), (TERM, 0.01)], [QUIT]),
    ],
)
def test_signals_that_come_together_count_once(signals, counted):
    escalation = Escalation()
    assert [number for number, at in signals if escalation.counts(number, 1000.0 + at)] == counted


STOP_LIMIT = 100.0 + GRACE - KILL_RESERVE


@pytest.mark.parametrize(
    ("signals", "announced", "stuck_at", "never_served", "kill"),
    [
        ((), None, None, False, None),
        ((), 500.0, None, False, Kill(500.0, KillCause.DEADLINE)),  # a fatal error
        ((), None, 90.0, False, Kill(90.0 + DUMP_TIME, KillCause.STUCK)),
        ((), 90.5, 90.0, False, Kill(90.0 + DUMP_TIME, KillCause.STUCK)),
        ((TERM,), None, None, False, Kill(STOP_LIMIT, KillCause.DEADLINE)),
        ((TERM,), 110.0, None, False, Kill(110.0, KillCause.DEADLINE)),
        ((TERM,), 500.0, None, False, Kill(STOP_LIMIT, KillCause.DEADLINE)),  # not believed
        ((TERM,), None, None, True, Kill(100.0 + FORCED_STOP, KillCause.START)),
        ((TERM,), 500.0, None, True, Kill(100.0 + FORCED_STOP, KillCause.START)),
        ((TERM,), None, 105.0, False, Kill(105.0 + DUMP_TIME, KillCause.STUCK)),
        ((TERM, INT), 110.0, None, False, Kill(110.0 + FORCED_STOP, KillCause.FORCED)),
        ((TERM, INT), None, None, True, Kill(110.0 + FORCED_STOP, KillCause.FORCED)),
        ((QUIT,), None, None, False, Kill(100.0 + FORCED_STOP, KillCause.FORCED)),
        ((TERM, INT), None, 110.5, False, Kill(110.5 + DUMP_TIME, KillCause.STUCK)),
        ((TERM, INT, TERM), None, None, False, Kill(100.0, KillCause.FORCED)),
        ((TERM, INT, TERM), 500.0, 119.0, True, Kill(100.0, KillCause.FORCED)),
    ],
)
def test_when_the_worker_is_killed(signals, announced, stuck_at, never_served, kill):
    assert after(*signals).kill(GRACE, announced, stuck_at, never_served=never_served) == kill


def test_a_fourth_signal_changes_nothing():
    assert after(TERM, INT, TERM, TERM).forced_at == after(TERM, INT).forced_at


@pytest.mark.parametrize("cause", KillCause)
def test_causes_are_logged_as_words(cause):
    assert f"{cause}" == str(cause) == cause.value
