"""What is drawn depends on seed and round only, and the table of exit codes says what the documentation says."""

from __future__ import annotations

import signal

import pytest

from dynamo_worker.testing.limits import AMOUNTS
from dynamo_worker.testing.random_draws import MOMENTS, OWNERS, Hit, allowed, draw, stages_between

PROCESSES = ("core", "rank")


def drawn(count=500):
    return [draw(1, number, PROCESSES, 5.0) for number in range(count)]


def test_the_same_seed_draws_the_same_rounds():
    assert drawn() == drawn()
    assert draw(2, 0, PROCESSES, 5.0) != draw(1, 0, PROCESSES, 5.0)
    assert draw(1, 1, PROCESSES, 5.0) == drawn(2)[1], "alone, too"


def test_everything_is_drawn_at_some_time():
    rounds = drawn()
    hits = [hit for one in rounds for hit in one.hits]
    assert {one.moment for one in rounds} == set(MOMENTS)
    assert {hit.victim for hit in hits} == {*OWNERS, *PROCESSES, "frontend"}
    assert {one.limit for one in rounds} == set(AMOUNTS)
    assert {hit.number.name for hit in hits} == {
        *("SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGSTOP")
    }
    assert all((hit.stopped > 0) == (hit.number is signal.SIGSTOP) for hit in hits)
    assert all(one.frontend for one in rounds if "frontend" in {hit.victim for hit in one.hits})
    assert any({hit.victim for hit in one.hits} == {"supervisor", "guardian"} for one in rounds)


CASES = [
    # victim, signal, stage, whether a stop was asked for, what is allowed
    ("supervisor", "SIGTERM", "serving", False, {0}),
    ("supervisor", "SIGTERM", "fork", False, {143}),
    ("supervisor", "SIGTERM", "draining", True, {0, 143}),
    ("supervisor", "SIGQUIT", "serving", False, {131}),
    ("supervisor", "SIGKILL", "start", False, {137}),
    ("guardian", "SIGTERM", "serving", False, {0}),
    ("guardian", "SIGSEGV", "draining", True, {1}),
    ("guardian", "SIGKILL", "cleanup", True, {0, 1}),
    ("worker", "SIGTERM", "exec", False, {143}),
    ("worker", "SIGHUP", "serving", False, {0}),
    ("worker", "SIGABRT", "serving", False, {134}),
    ("core", "SIGKILL", "start", False, {3}),
    ("core", "SIGKILL", "draining", True, {1}),
    ("core", "SIGKILL", "cleanup", True, {0, 1}),
    ("core", "SIGTERM", "serving", False, {0, 1}),
    ("frontend", "SIGKILL", "serving", False, {1}),
    ("frontend", "SIGKILL", "draining", True, {0, 1}),
]


@pytest.mark.parametrize(("victim", "number", "stage", "stop_asked", "codes"), CASES)
def test_the_codes_of_one_hit(victim, number, stage, stop_asked, codes):
    hits = [(Hit(victim, signal.Signals[number], 0.0), {stage})]
    assert allowed("none", hits, 5.0, stop_asked=stop_asked) == codes


def test_one_hit_that_is_fatal_for_certain_rules_a_clean_stop_out():
    stop = (Hit("supervisor", signal.SIGTERM, 0.0), {"serving"})
    death = (Hit("rank", signal.SIGKILL, 0.0), {"draining"})
    assert allowed("none", [stop, death], 5.0, stop_asked=False) == {1}
    assert allowed("none", [stop], 5.0, stop_asked=False) == {0}
    assert allowed("none", [], 5.0, stop_asked=False) == {0}


def test_what_runs_short_may_fail_the_start_or_the_worker():
    assert allowed("files", [], 5.0, stop_asked=False) == {0, 1, 3}
    assert allowed("pids", [], 5.0, stop_asked=False) == {0, 1, 3}
    assert allowed("memory", [], 5.0, stop_asked=False) >= {0, 1, 3, 134}


@pytest.mark.parametrize(("stopped", "codes"), [(0.5, {0}), (8.0, {0, 1, 3, 6})])
def test_a_short_stop_is_nothing_and_a_long_one_may_be(stopped, codes):
    hits = [(Hit("worker", signal.SIGSTOP, 0.0, stopped), {"serving"})]
    assert allowed("none", hits, 5.0, stop_asked=False) == codes


LOG = """2026-11-21T14:00:00.000Z INFO dynamo_worker.supervisor: Worker started pid=2
2026-11-21T14:00:01.000Z INFO dynamo_worker.host.launcher: Starting worker engine=echo
2026-11-21T14:00:02.000Z INFO dynamo_worker.host.startup: Worker ready model=echo
2026-11-21T14:00:09.000Z INFO dynamo_worker.host.launcher: Cleaning up worker in_flight=0
"""
BEGAN = 1795269600.0


@pytest.mark.parametrize(
    ("since", "until", "stages"),
    [
        (-5, -5, {"fork"}),
        (0.5, 0.5, {"exec"}),
        (1.5, 1.5, {"start"}),
        (2.01, 2.01, {"start", "serving"}),
        (5, 5, {"serving"}),
        (5, 20, {"serving", "cleanup"}),
    ],
)
def test_the_log_says_in_which_stage_a_worker_was(since, until, stages):
    assert stages_between(LOG, BEGAN + since, BEGAN + until) == stages


def test_a_worker_that_has_said_nothing_was_nowhere_yet():
    assert stages_between("", BEGAN, BEGAN) == {"fork"}
