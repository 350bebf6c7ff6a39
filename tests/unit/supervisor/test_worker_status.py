"""The worker's status after valid and invalid messages."""

from __future__ import annotations

import pytest

from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.worker_status import ENDING, WorkerStatus, positive


@pytest.fixture
def status():
    return WorkerStatus(100.0, 30.0, "/dev/termination-log")


def said(status, *states):
    for state in states:
        assert status.take({"type": "state", "state": state}, 101.0)
    return status


def test_before_the_first_message(status):
    assert status.state is State.STARTING
    assert status.never_served
    assert status.beat_due is None
    assert (status.deadline, status.exit_code, status.reason, status.said_farewell) == (None, None, "", False)


def test_a_state(status):
    assert status.take({"type": "state", "state": "DRAINING", "deadline": 120.5, "in_flight": 3}, 110.0)
    assert status.state is State.DRAINING
    assert (status.deadline, status.in_flight, status.last_beat) == (120.5, 3, 110.0)
    said(status, "CLEANUP")
    assert status.deadline is None, "a deadline is that of one state"


@pytest.mark.parametrize(("told", "shown"), [("drained", "drained"), ("serving", ""), (None, ""), (7, "")])
def test_the_phase_of_a_drain_on_request(status, told, shown):
    status.take({"type": "state", "state": "SERVING", "drain": told}, 103.0)
    assert status.drain == shown


@pytest.mark.parametrize("state", [9, None, "NAPPING", "", ["SERVING"], "serving"])
def test_an_unknown_state_changes_nothing(status, state):
    said(status, "SERVING")
    assert not status.take({"type": "state", "state": state, "deadline": 5.0, "in_flight": 7}, 103.0)
    assert (status.state, status.deadline, status.in_flight) == (State.SERVING, None, 0)
    assert status.last_beat == 103.0, "it is alive"


@pytest.mark.parametrize("value", [None, "x", -1, float("nan"), float("inf"), 1e12, True, [1]])
def test_numbers_that_are_none(status, value):
    status.take({"type": "state", "state": "SERVING", "deadline": value, "in_flight": value}, 101.0)
    assert (status.deadline, status.in_flight) == (None, 0)
    status.take({"type": "settings", "termination_grace_period": value, "heartbeat_timeout": value}, 101.0)
    assert (status.grace_period, status.heartbeat_timeout) == (30.0, 0.0)


def test_settings(status):
    message = {"type": "settings", "termination_grace_period": 5, "heartbeat_timeout": 2.5}
    assert not status.take({**message, "termination_message_path": "/x"}, 101.0)
    assert (status.grace_period, status.heartbeat_timeout, status.termination_message_path) == (5.0, 2.5, "/x")
    status.take({"type": "settings", "termination_message_path": ""}, 101.0)
    assert (status.grace_period, status.termination_message_path) == (5.0, "/x")


@pytest.mark.parametrize(
    ("said", "log_format"), [("json", "json"), ("text", "text"), ("xml", None), (3, None), ([], None)]
)
def test_the_log_format(status, said, log_format):
    status.take({"type": "settings", "log_format": said}, 101.0)
    assert status.log_format == log_format


def test_a_heartbeat(status):
    assert not status.take({"type": "heartbeat", "in_flight": 4}, 105.0)
    assert (status.in_flight, status.last_beat) == (4, 105.0)


def test_a_message_of_an_unknown_type_is_a_sign_of_life(status):
    assert not status.take({"type": "greeting"}, 105.0)
    assert status.last_beat == 105.0


class TestFarewell:
    def test_code_and_reason(self, status):
        assert not status.take({"type": "exit", "code": 3, "reason": "no GPU"}, 101.0)
        assert (status.said_farewell, status.exit_code, status.reason) == (True, 3, "no GPU")

    @pytest.mark.parametrize("code", [-1, 256, True, 1.0, "1", None])
    def test_codes_that_are_none(self, status, code):
        status.take({"type": "exit", "code": code, "reason": 5}, 101.0)
        assert (status.said_farewell, status.exit_code, status.reason) == (True, None, "")

    def test_the_reason_of_a_fatal_error_comes_before_it(self, status):
        status.take({"type": "state", "state": "FATAL", "reason": "engine died"}, 101.0)
        status.take({"type": "state", "state": "FATAL", "reason": "a consequence"}, 102.0)
        assert (status.reason, status.said_farewell) == ("engine died", False)
        status.take({"type": "exit", "code": 1, "reason": "engine died, said twice"}, 103.0)
        assert status.reason == "engine died, said twice"

    def test_only_a_fatal_error_has_a_reason(self, status):
        status.take({"type": "state", "state": "DRAINING", "reason": "asked to"}, 101.0)
        assert status.reason == ""

    def test_a_long_reason_is_cut(self, status):
        status.take({"type": "exit", "code": 1, "reason": "x" * 5000}, 101.0)
        assert status.reason == "x" * 2000


@pytest.mark.parametrize(
    ("states", "never_served"),
    [
        ((), True),
        (("STARTING",), True),
        (("CLEANUP",), True),
        (("SERVING",), False),
        (("SERVING", "CLEANUP"), False),
        (("FATAL",), False),
        (("DRAINING",), False),
    ],
)
def test_a_start_that_is_interrupted(status, states, never_served):
    assert said(status, *states).never_served is never_served


@pytest.mark.parametrize("state", State)
def test_the_states_whose_heartbeat_counts(status, state):
    status.take({"type": "settings", "heartbeat_timeout": 5.0}, 100.0)
    said(status, state.value)
    watched = {State.SERVING, State.UNREGISTERING, State.GRACE, State.DRAINING}
    assert status.beat_due == (106.0 if state in watched else None)


def test_heartbeats_can_be_switched_off(status):
    assert said(status, "SERVING").beat_due is None


def test_states_of_the_end():
    assert set(State) - {State.STARTING, State.SERVING, State.STOPPED} == ENDING


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5.0), ("x", 30.0), ("", 30.0), ("-1", 30.0), ("nan", 30.0), ("0", 30.0)]
)
def test_settings_that_are_no_positive_number(text, number):
    assert positive(text, 30.0) == number
