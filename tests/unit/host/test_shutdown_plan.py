"""The termination grace period is divided as announced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.config.shutdown_plan import ShutdownPlan
from dynamo_worker.supervisor.protocol import FORCED_STOP, KILL_RESERVE


def slices(plan):
    return plan.unregister + plan.grace + plan.drain + plan.cleanup + plan.kill_reserve


def test_defaults():
    plan = WorkerSettings().shutdown_plan
    assert (plan.unregister, plan.grace, plan.drain, plan.cleanup, plan.kill_reserve) == (1, 5, 17, 5, 2)
    assert plan.fits
    assert plan.warnings == ()


def test_handoff_has_no_grace_period_by_default():
    plan = WorkerSettings(drain="handoff").shutdown_plan
    assert (plan.grace, plan.drain) == (0, 22)


def test_short_cleanup_limit_gives_its_time_to_the_drain():
    assert ShutdownPlan.divide(total=30, grace=5, cleanup_limit=1).drain == 21


@given(st.floats(0.1, 1000), st.floats(0, 1000), st.floats(0.1, 100))
def test_slices_add_up_when_they_fit_and_warn_when_not(total, grace, cleanup_limit):
    plan = ShutdownPlan.divide(total, grace, cleanup_limit)
    assert plan.drain >= 0
    if plan.fits:
        assert slices(plan) == pytest.approx(total)
    else:
        assert plan.warnings


@given(st.floats(0.1, 1000), st.floats(0, 1000), st.floats(0.1, 100))
def test_no_stage_may_outlive_the_worker(total, grace, cleanup_limit):
    plan = ShutdownPlan.divide(total, grace, cleanup_limit)
    end = plan.worker_deadline(100.0).at
    assert end == pytest.approx(100 + total - KILL_RESERVE)
    assert plan.drain_deadline(100.0).at == pytest.approx(end - plan.cleanup)
    assert plan.unregister_deadline(100.0).at <= plan.drain_deadline(100.0).at
    assert plan.grace_deadline(100.5, 100.0).at <= plan.drain_deadline(100.0).at


def test_grace_counts_from_leaving_discovery():
    plan = ShutdownPlan.divide(total=30, grace=5, cleanup_limit=30)
    assert plan.grace_deadline(unregistered_at=100.2, received_at=100.0).at == pytest.approx(105.2)


def test_forced():
    assert ShutdownPlan.forced_deadline(100.0).at == 100 + FORCED_STOP


@pytest.mark.parametrize(
    ("total", "grace", "mode", "words"),
    [
        (30, 30, "complete", "is not shorter than"),
        (30, 25, "complete", "3 s are missing"),
        (30, 25, "handoff", "3 s are missing"),
        (30, 21.5, "complete", "only 0.5 s are left"),
    ],
)
def test_warnings(total, grace, mode, words):
    (warning,) = ShutdownPlan.divide(total, grace, cleanup_limit=30, mode=DrainMode(mode)).warnings
    assert words in warning


def test_handoff_needs_no_time_to_drain():
    assert ShutdownPlan.divide(total=30, grace=22, cleanup_limit=30, mode=DrainMode.HANDOFF).warnings == ()
