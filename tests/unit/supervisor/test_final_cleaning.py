"""The supervisor's part of cleaning up: deadlines, patience with the guardian, and who takes over when it fails."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from dynamo_worker.supervisor import final_cleaning
from dynamo_worker.supervisor.escalation import Escalation
from dynamo_worker.supervisor.final_cleaning import FinalCleaning
from dynamo_worker.supervisor.worker_status import WorkerStatus


class World:
    """A scripted guardian, and a clock that advances only while something waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sent: list[tuple[str, dict]] = []
        self.errors: list[str] = []
        self.signals: list[int] = []
        self.frontend_alive = False
        self.escalation = Escalation()
        self.guardian = SimpleNamespace(
            pid=7, report=None, exit_code=None, knows_the_end=True, hangs=False,
            channel=SimpleNamespace(send=lambda kind, **fields: self.sent.append((kind, fields))),
            kill=lambda: self.signals.append(-7),
        )  # fmt: skip
        self.worker = SimpleNamespace(process=None, pid=None, exit_code=0, alive=False, signal=self.signals.append)
        self.relay = SimpleNamespace(start=lambda loop: None, finish=lambda: None)
        self.cleanup = SimpleNamespace(deadline=0.0, frontend_deadline=0.0, rough=None, has_killed=lambda pid: pid == 5)
        self.cleaning = FinalCleaning(
            self.guardian, self.worker, WorkerStatus(0.0, 30.0, ""), self.escalation,
            run_directory=SimpleNamespace(descriptor=0),
            strangers=(),
            relay=self.relay,
            loop=SimpleNamespace(reap=None),
            wait=self.wait,
            log=SimpleNamespace(error=lambda message, **fields: self.errors.append(message)),
        )  # fmt: skip

    def wait(self, seconds, descriptor):
        self.now += seconds
        self.happen()

    def pump(self, until):
        self.now = max(self.now, until)
        self.happen()

    def happen(self):
        """Do nothing: no answer comes."""

    def make_cleanup(self, run_directory, *, rough, worker, **_):
        self.cleanup.rough, self.cleanup.worker = rough, worker
        self.cleanup.run = lambda: {"processes": 2}
        return self.cleanup


@pytest.fixture
def world(monkeypatch):
    it = World()
    monkeypatch.setattr(final_cleaning, "time", SimpleNamespace(monotonic=lambda: it.now))
    monkeypatch.setattr(final_cleaning.ledger, "frontend", lambda directory: ((1, 2), 60.0))
    monkeypatch.setattr(final_cleaning.linux, "is_alive", lambda process: it.frontend_alive)
    monkeypatch.setattr(final_cleaning, "Cleanup", it.make_cleanup)
    return it


class TestDeadlines:
    def test_the_guardian_is_told(self, world):
        world.cleaning.update_deadlines()
        assert world.sent == [], "the worker still runs"
        world.cleaning.begin(100.0)
        world.cleaning.update_deadlines()
        assert world.sent == [("deadline", {"at": 115.0, "frontend": 128.5})]

    def test_ours_move_with_them(self, world):
        world.cleaning.begin(100.0)
        world.cleaning.take_over()
        world.escalation.hurried = True
        world.cleaning.update_deadlines()
        assert (world.cleanup.deadline, world.cleanup.frontend_deadline) == (102.0, 100.0)


class TestAwaitReport:
    @pytest.fixture
    def begun(self, world):
        world.cleaning.begin(world.now)
        world.cleaning.update_deadlines()
        return world

    def test_a_report_is_returned_once_the_guardian_has_ended(self, begun):
        def happen():
            if begun.guardian.report is None:
                begun.guardian.report = {"processes": 1}
            else:
                begun.guardian.exit_code = 0

        begun.happen = happen
        assert begun.cleaning.await_report(begun.pump) == {"processes": 1}
        assert begun.guardian.exit_code == 0

    def test_a_guardian_that_reports_but_stays_delays_nothing(self, begun):
        begun.guardian.report = {"processes": 1}
        assert begun.cleaning.await_report(begun.pump) == {"processes": 1}
        assert begun.now == pytest.approx(100.2)

    def test_one_that_does_not_answer(self, begun):
        assert begun.cleaning.await_report(begun.pump) is None
        assert begun.now == 116.0

    def test_less_time_while_the_grace_period_runs_out(self, begun):
        begun.escalation.escalate(signal.SIGTERM, 75.0)
        begun.cleaning.update_deadlines()
        assert begun.cleaning.await_report(begun.pump) is None
        assert begun.now == pytest.approx(104.2)

    def test_one_that_dies(self, begun):
        def die():
            begun.guardian.exit_code = -9

        begun.happen = die
        assert begun.cleaning.await_report(begun.pump) is None

    def test_after_a_third_signal_it_finishes_without_us(self, begun):
        begun.escalation.hurried = True
        begun.cleaning.update_deadlines()
        assert begun.cleaning.await_report(begun.pump) == {}
        assert begun.now < 102.0

    def test_it_waits_for_a_frontend_with_streams(self, begun):
        begun.frontend_alive = True
        assert begun.cleaning.await_report(begun.pump) is None
        assert begun.now == pytest.approx(128.5 + 1.0, abs=1.0)


class TestTakeOver:
    @pytest.mark.parametrize("hangs", [False, True])
    def test_a_guardian_that_does_not_answer(self, world, hangs):
        world.guardian.hangs = hangs
        world.cleaning.begin(100.0)
        assert world.cleaning.take_over() == {"processes": 2, "frontend": None}
        assert world.errors == ["Guardian is not responding; supervisor takes over"]
        assert world.signals == [-7]
        assert world.cleanup.rough is hangs, "what it hangs in would hold us up, too"
        assert not world.cleaning.guardian_lost
        assert world.cleaning.taken_over

    def test_a_worker_that_survives(self, world, monkeypatch):
        monkeypatch.setattr(final_cleaning.process_tree, "describe", lambda process: "in nvidia_close")
        world.worker.process, world.worker.alive, world.worker.exit_code = (3, 4), True, None
        world.cleaning.take_over()
        assert world.errors == ["Worker survived SIGKILL; supervisor takes over"]
        assert world.signals == [-7, signal.SIGKILL]

    @pytest.mark.parametrize("knows_the_end", [False, True])
    def test_a_guardian_that_is_dead(self, world, knows_the_end):
        world.guardian.exit_code, world.guardian.knows_the_end = -9, knows_the_end
        world.cleaning.take_over()
        assert world.errors == ["Guardian died; supervisor is killing the worker"]
        assert world.signals == []
        assert world.cleaning.guardian_lost is not knows_the_end

    def test_whom_we_have_killed_is_no_failure(self, world):
        assert not world.cleaning.has_killed(5)
        world.cleaning.take_over()
        assert world.cleaning.has_killed(5)
        assert not world.cleaning.has_killed(6)

    def test_the_failure_of_the_frontend_is_in_the_report(self, world):
        world.cleaning.frontend_failure = "killed by signal 9"
        assert world.cleaning.take_over()["frontend"] == "killed by signal 9"
