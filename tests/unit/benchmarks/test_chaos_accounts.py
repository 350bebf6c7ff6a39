"""The accounts of the chaos: what is lost, left and unexplained is counted, and nothing else is."""

from __future__ import annotations

import json

import pytest

from chaos_run.accounts import (
    CANCELLED,
    EXCUSED,
    LOST,
    OUTCOMES,
    REFUSED,
    RIGHT,
    UNSERVED,
    WRONG,
    Accounts,
    Answered,
    Asked,
    Exit,
)
from chaos_run.summary import print_summary, verdict
from chaos_run.table import BY_NAME, TABLE

ASKED = Asked("short", "echo", "frontend-0", "abcabcab", 100.0)
KILLED = BY_NAME["worker killed"]
GONE = "Stream disconnected"


def answered(
    text: str = "abcabcab", reason: str | None = "length", error: str | None = None, **more: object
) -> Answered:
    values = {"status": 200, "ended": 101.0, **more}
    return Answered(text=text, reason=reason, error=error, **values)  # type: ignore[arg-type]


@pytest.fixture
def accounts() -> Accounts:
    """Accounts of a model that has two healthy workers."""
    result = Accounts()
    result.healthy("echo", 2, 90.0)
    return result


def outcome(accounts: Accounts, answer: Answered, asked: Asked = ASKED) -> str:
    accounts.asked()
    found = accounts.answered(asked, answer)
    assert accounts.open == 0
    assert accounts.outcomes[found] == 1
    assert accounts.kinds[asked.kind][found] == 1
    assert sum(accounts.failed.values()) == (found in (LOST, WRONG))
    return found


def test_the_whole_text_is_right(accounts: Accounts) -> None:
    assert outcome(accounts, answered()) == RIGHT


@pytest.mark.parametrize(
    "answer",
    [
        answered(text="abcabc", reason=None, error=GONE),
        answered(text="", reason=None, status=503, error="no instances"),
        answered(text="", reason=None, status=0, error="ServerDisconnectedError"),
        answered(text="abcabc", reason=None),  # a stream that ends without an end
        answered(error="an error after all"),
    ],
)
def test_a_request_that_another_worker_could_have_finished_is_lost(accounts: Accounts, answer: Answered) -> None:
    accounts.fault(KILLED, "#4 worker killed: process-1", "process-1", 100.4)
    assert outcome(accounts, answer) == LOST
    (failure,) = accounts.failures
    assert failure.kind == "lost"
    assert failure.faults == ("#4 worker killed: process-1 (+0.40 s after the request began)",)
    assert f"{len(answer.text)} of 8 characters" in failure.text


@pytest.mark.parametrize("text", ["abcabcaX", "abcabcabc", "bca", "abcabc"])
def test_another_text_is_wrong(accounts: Accounts, text: str) -> None:
    assert outcome(accounts, answered(text=text)) == WRONG


def test_a_wrong_beginning_is_wrong_whatever_happens_to_its_request(accounts: Accounts) -> None:
    accounts.excuse("frontend killed", 100.0, frontend="frontend-0")
    accounts.healthy("echo", 0, 100.0)
    assert outcome(accounts, answered(text="abX", reason=None, error=GONE, cancelled=True)) == WRONG


def test_a_client_that_goes_away_loses_nothing(accounts: Accounts) -> None:
    assert outcome(accounts, answered(text="abc", reason=None, cancelled=True)) == CANCELLED


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (answered(text="", reason=None, status=400, error="too long"), REFUSED),
        (answered(text="", reason=None, error='data: {"error":{"message":"the prompt has …","code":400}}'), REFUSED),
        (answered(text="", reason=None, status=503, error="no instances"), LOST),
        (answered(text="", reason=None, error='data: {"error":{"message":"lost","code":503}}'), LOST),
        (answered(), WRONG),
    ],
)
def test_what_cannot_be_served_must_be_refused_properly(accounts: Accounts, answer: Answered, expected: str) -> None:
    assert outcome(accounts, answer, Asked("too long", "echo", "frontend-0", "abcabcab", 100.0, True)) == expected


def test_what_can_be_served_must_not_be_refused(accounts: Accounts) -> None:
    assert outcome(accounts, answered(text="", reason=None, status=400, error="too long")) == LOST


@pytest.mark.parametrize(
    ("scope", "end", "expected"),
    [
        ({"frontend": "frontend-0"}, 102.0, EXCUSED),
        ({"frontend": "frontend-1"}, 102.0, LOST),
        ({"group": "echo"}, 102.0, EXCUSED),
        ({"group": "text"}, 102.0, LOST),
        ({"frontend": "frontend-0"}, 100.9, LOST),  # it ended after the interval
    ],
)
def test_only_requests_like_those_of_the_fault_are_excused(
    accounts: Accounts, scope: dict[str, str], end: float, expected: str
) -> None:
    excuse = accounts.excuse("frontend killed", 100.0, **scope)
    excuse.end = end
    assert outcome(accounts, answered(text="abc", reason=None, error=GONE)) == expected
    assert accounts.excuses == ({"frontend killed": 1} if expected == EXCUSED else {})


@pytest.mark.parametrize(("text", "expected"), [("", EXCUSED), ("abc", LOST)])
def test_a_stream_that_has_begun_does_not_need_discovery(accounts: Accounts, text: str, expected: str) -> None:
    accounts.excuse("etcd emptied", 100.0, unbegun=True)
    assert outcome(accounts, answered(text=text, reason=None, status=503, error=GONE)) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([(100.5, 0)], UNSERVED),
        ([(99.0, 0), (100.5, 1)], UNSERVED),
        ([(99.0, 0), (99.5, 1)], LOST),
        ([(100.5, 1)], LOST),
        ([(101.5, 0)], LOST),
    ],
)
def test_a_model_without_a_healthy_worker_loses_nothing(
    accounts: Accounts, counts: list[tuple[float, int]], expected: str
) -> None:
    for at, count in counts:
        accounts.healthy("echo", count, at)
    accounts.healthy("text", 0, 100.5)  # another model's
    assert outcome(accounts, answered(text="abc", reason=None, error=GONE)) == expected


def end(
    code: int | None = 137, reason: str = "worker killed by SIGKILL (not out of memory)", seconds: float = 0.4
) -> Exit:
    return Exit("process-1.7", "#4 worker killed", code, reason, seconds, KILLED.codes, KILLED.reason, 2.0)


def test_an_exit_that_the_fault_explains(accounts: Accounts) -> None:
    assert not accounts.exited(end(), KILLED, 101.0, "")
    assert not accounts.failed
    assert accounts.rows[KILLED.name].exits == {"137": 1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (end(code=0), r"exit code 0 .*, expected \[137\]"),
        (
            end(reason="event loop unresponsive"),
            "reason 'event loop unresponsive', expected 'worker killed by SIGKILL'",
        ),
        (end(reason=""), "reason ''"),
        (end(seconds=2.5), r"exited after 2.5 s, at most 2.0 s"),
        (end(code=None, seconds=9.0), r"still runs after 9.0 s, at most 2.0 s"),
        (Exit("process-1.7", "", 1, "", 0.0, frozenset(), "", 0.0), "although nothing was done to it"),
    ],
)
def test_an_exit_that_no_fault_explains_is_a_failure(accounts: Accounts, wrong: Exit, said: str) -> None:
    (problem,) = accounts.exited(wrong, KILLED, 101.0, "its log")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(problem)
    assert accounts.failed == {"exit": 1}
    assert accounts.rows[KILLED.name].failures == {"exit": 1}
    assert accounts.failures[0].log == "its log"


def test_everything_that_is_left_is_a_failure(accounts: Accounts) -> None:
    accounts.left("process-1.7", [], "#4", KILLED, 101.0, "")
    assert not accounts.failed
    accounts.left("process-1.7", ["process 12: core", "file dw-12-x"], "#4", KILLED, 101.0, "")
    assert accounts.failed == {"leftover": 2}
    assert accounts.failures[0].text == "process-1.7 left process 12: core"


def test_many_failures_are_counted_and_not_kept(accounts: Accounts) -> None:
    for number in range(1000):
        accounts.fail("leftover", 101.0, f"file {number}")
    assert accounts.failed == {"leftover": 1000}
    assert len(accounts.failures) == 200


def test_the_summary_shows_each_failure_and_is_json(accounts: Accounts, capsys: pytest.CaptureFixture[str]) -> None:
    accounts.fault(KILLED, "#4 worker killed: process-1", "process-1", 100.4)
    outcome(accounts, answered(text="abc", reason=None, error=GONE))
    accounts.exited(end(code=0), KILLED, 101.0, "the last line")
    print_summary(accounts, TABLE)
    shown = capsys.readouterr().out
    assert "FAILURE (lost) lost short request for echo through frontend-0" in shown
    assert "FAILURE (exit) process-1.7: exit code 0" in shown
    assert "| the last line" in shown
    assert "FAILED: 2 failures (1 exit, 1 lost)" in verdict(accounts, 60.0, 6.0, 0, 0)
    written = json.loads(json.dumps(accounts.as_json()))
    assert written["requests"] == {**dict.fromkeys(OUTCOMES, 0), LOST: 1}
    assert written["rows"][KILLED.name]["exits"] == {"0": 1}
    assert written["failed"] == {"lost": 1, "exit": 1}


def test_a_run_without_failures_says_so(accounts: Accounts) -> None:
    accounts.fault(KILLED, "#4 worker killed: process-1", "process-1", 100.4)
    outcome(accounts, answered())
    assert "1 faults in 1.0 minutes (60 per hour)" in verdict(accounts, 60.0, 6.0, 0, 0)
    assert "no failure" in verdict(accounts, 60.0, 6.0, 0, 0)
