"""The state table is total, and does what the design says."""

from __future__ import annotations

import pytest

from dynamo_worker.lifecycle import TRANSITIONS, Event, State

GRACEFUL = [
    (State.STARTING, Event.ENGINE_READY),
    (State.SERVING, Event.STOP_REQUESTED),
    (State.UNREGISTERING, Event.UNREGISTERED),
    (State.GRACE, Event.GRACE_OVER),
    (State.DRAINING, Event.DRAINED),
    (State.CLEANUP, Event.CLEANED_UP),
]


def test_every_pair_has_a_transition():
    assert set(TRANSITIONS) == {(state, event) for state in State for event in Event}


def test_graceful_life_goes_through_every_stage():
    state = State.STARTING
    for expected, event in GRACEFUL:
        assert state is expected
        state = TRANSITIONS[state, event]
    assert state is State.STOPPED


@pytest.mark.parametrize("event", Event)
def test_stopped_is_final(event):
    assert TRANSITIONS[State.STOPPED, event] is State.STOPPED


@pytest.mark.parametrize("state", [State.CLEANUP, State.FATAL])
@pytest.mark.parametrize("event", Event)
def test_ending_states_leave_only_when_cleaned_up(state, event):
    expected = State.STOPPED if event is Event.CLEANED_UP else state
    assert TRANSITIONS[state, event] is expected


@pytest.mark.parametrize(
    "state", [State.STARTING, State.SERVING, State.UNREGISTERING, State.GRACE, State.DRAINING], ids=str
)
def test_fatal_and_forced_cut_every_live_state_short(state):
    assert TRANSITIONS[state, Event.FATAL_ERROR] is State.FATAL
    assert TRANSITIONS[state, Event.FORCE_STOP_REQUESTED] is State.CLEANUP


def test_stop_and_failure_during_the_start():
    assert TRANSITIONS[State.STARTING, Event.STOP_REQUESTED] is State.CLEANUP
    assert TRANSITIONS[State.STARTING, Event.START_FAILED] is State.FATAL


@pytest.mark.parametrize("state", [State.UNREGISTERING, State.GRACE, State.DRAINING], ids=str)
def test_a_repeated_stop_changes_nothing(state):
    assert TRANSITIONS[state, Event.STOP_REQUESTED] is state


def test_every_state_is_reachable_and_ends():
    reachable, frontier = {State.STARTING}, [State.STARTING]
    while frontier:
        state = frontier.pop()
        for event in Event:
            following = TRANSITIONS[state, event]
            if following not in reachable:
                reachable.add(following)
                frontier.append(following)
    assert reachable == set(State)
