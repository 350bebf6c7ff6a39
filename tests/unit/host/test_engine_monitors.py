"""A sick engine is noticed in time, a healthy one is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
import uvloop
from aio import settle, until

from dynamo_worker.errors import EngineDeadError, EngineStalledError, WorkerError
from dynamo_worker.host.monitors.engine_activity import Finding
from dynamo_worker.host.monitors.engine_monitors import (
    OBSERVED_SHARE,
    FrontendMonitor,
    HealthMonitor,
    Heartbeat,
    StallMonitor,
)
from dynamo_worker.host.plugins.calling import HookOutcome, call_concurrently
from dynamo_worker.host.requests.serving import RequestRegistry
from dynamo_worker.host.status.metrics import WorkerMetrics


@contextlib.asynccontextmanager
async def running(monitor):
    task = asyncio.ensure_future(monitor.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# ------------------------------------------------------------------------------------------------------------ health


class FakePlugins:
    """Calls the hooks of a test as the real one does."""

    def __init__(self, **hooks):
        self.hooks = hooks
        self.rounds = 0

    async def check_health(self, engine, timeout):
        self.rounds += 1
        outcomes = await call_concurrently(
            "check_health", {name: lambda hook=hook: hook(engine) for name, hook in self.hooks.items()}, timeout,
            quiet=True,
        )  # fmt: skip
        for outcome in outcomes:
            if isinstance(outcome.error, EngineDeadError):
                raise outcome.error
        return outcomes


class Pausing:
    """An engine that an operator has paused."""

    def __init__(self):
        self.now = True

    def paused(self):
        return self.now


IDLE = Finding(False, "no compiler runs")
WORKS = Finding(True, "compiler nvcc runs (process 5)")


class FakeActivity:
    """Finds what a test says about the engine's processes, the last of it again and again."""

    def __init__(self, *findings):
        self.findings = findings or (IDLE,)
        self.asked = 0
        self.open = set()
        self.windows = []

    def observe(self, seconds, progress, *, after=0.0):
        self.windows.append((seconds, after))
        return FakeObservation(self, len(self.windows))


class FakeObservation:
    def __init__(self, activity, number):
        self.activity, self.number = activity, number
        activity.open.add(number)

    def finding(self):
        self.activity.asked += 1
        return self.activity.findings[min(self.activity.asked, len(self.activity.findings)) - 1]

    def close(self):
        self.activity.open.discard(self.number)


class Health:
    def __init__(self, interval=0.01, timeout=1.0, engine="engine", activity=None, busy_timeout=0.0, **hooks):
        self.plugins = FakePlugins(**hooks)
        registry = RequestRegistry()
        self.metrics = WorkerMetrics(registry)
        self.reported = []
        self.monitor = HealthMonitor(
            self.plugins, engine, registry, activity or FakeActivity(), self.metrics, self.reported.append,
            interval=interval, timeout=timeout, busy_timeout=busy_timeout,
        )  # fmt: skip

    def sample(self, name):
        lines = self.metrics.exposition().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def raising(error):
    async def hook(engine):
        raise error

    return hook


async def hang(engine):
    await asyncio.sleep(60)


def test_a_healthy_engine_is_asked_again_and_again():
    seen = []

    async def main():
        health = Health(toy=lambda engine: seen.append(engine))
        async with running(health.monitor):
            await until(lambda: health.plugins.rounds >= 3)
        assert health.reported == []
        assert health.sample("dynamo_worker_health_check_seconds_count") >= 2
        assert health.sample("dynamo_worker_health_check_failures_total") == 0

    asyncio.run(main())
    assert set(seen) == {"engine"}


def test_a_dead_engine_is_fatal():
    async def main():
        death = EngineDeadError("the scheduler is gone")
        health = Health(toy=raising(death))
        async with running(health.monitor) as task:
            await asyncio.wait_for(task, 5)
        assert health.reported == [death]
        assert health.plugins.rounds == 1

    asyncio.run(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("timeout", [0.03, 0.0504, 0.1009])
def test_a_check_that_does_not_answer_is_fatal(loop, timeout):
    """Also when the loop's timers fire a little early, as uvloop's do."""

    async def main():
        health = Health(toy=hang, timeout=timeout)
        async with running(health.monitor) as task:
            await asyncio.wait_for(task, 5)
        (error,) = health.reported
        assert isinstance(error, EngineStalledError)
        assert "toy" in str(error)
        assert health.plugins.rounds == 1

    runner = loop()
    try:
        runner.run_until_complete(main())
    finally:
        runner.close()


def test_a_broken_check_is_logged_and_counted_but_ends_nothing(caplog):
    async def main():
        health = Health(broken=raising(KeyError("bug")), toy=lambda engine: None)
        async with running(health.monitor) as task:
            await until(lambda: health.plugins.rounds >= 3)
            assert not task.done()
        assert health.reported == []
        assert health.sample("dynamo_worker_health_check_failures_total") >= 2

    asyncio.run(main())
    assert {record.fields["plugin"] for record in caplog.records if hasattr(record, "fields")} == {"broken"}


def test_a_timeout_of_the_checks_own_is_an_ordinary_error():
    """A plugin that gives up on its own HTTP call after a second has said nothing about the engine."""

    async def main():
        health = Health(toy=raising(TimeoutError("metrics port")), timeout=30)
        async with running(health.monitor) as task:
            await until(lambda: health.plugins.rounds >= 2)
            assert not task.done()
        assert health.reported == []

    asyncio.run(main())


@pytest.mark.parametrize("ends_meanwhile", [False, True])
def test_a_check_of_a_paused_engine_may_take_its_time(ends_meanwhile):
    """It loads other weights, for one; when that ends, a check that was begun before may still not have an answer."""

    async def main():
        engine = Pausing()

        async def late(_):
            engine.now = not ends_meanwhile or health.plugins.rounds > 1
            await asyncio.sleep(60)

        health = Health(toy=late, timeout=0.03, engine=engine)
        async with running(health.monitor) as task:
            await until(lambda: health.plugins.rounds >= 2)
            assert not task.done()
            assert health.reported == []
            assert health.sample("dynamo_worker_health_check_failures_total") == 0

    asyncio.run(main())


def test_a_check_that_an_engine_has_no_time_for_is_not_fatal(caplog):
    """It compiles: its scheduler answers nobody for a minute."""

    async def main():
        activity = FakeActivity(WORKS, WORKS, IDLE)
        health = Health(toy=hang, timeout=0.03, activity=activity)
        async with running(health.monitor) as task:
            await asyncio.wait_for(task, 5)
        assert health.plugins.rounds == activity.asked == 3
        (error,) = health.reported
        assert str(error).endswith("s: no compiler runs")
        assert activity.windows[0] == pytest.approx((0.006, 0.024)), "the processes are observed at the end of a check"

    asyncio.run(main())
    said = [record.fields for record in caplog.records if record.getMessage().startswith("No answer to a health check")]
    assert [(fields["plugin"], fields["sign"]) for fields in said] == [("toy", WORKS.reason)] * 2


def test_a_check_without_an_answer_is_fatal_at_the_second_bound_however_busy_the_engine():
    async def main():
        health = Health(toy=hang, timeout=0.1, activity=FakeActivity(WORKS), busy_timeout=0.5)
        async with running(health.monitor) as task:
            started = time.monotonic()
            await asyncio.wait_for(task, 5)
            assert 0.5 <= time.monotonic() - started <= 0.8
        (error,) = health.reported
        assert isinstance(error, EngineStalledError)
        assert "within 0.5" in str(error)
        assert "although the engine works: compiler nvcc" in str(error)

    asyncio.run(main())


def test_an_answer_ends_the_patience_with_checks():
    async def main():
        async def every_other(_):
            await asyncio.sleep(60 if health.plugins.rounds % 2 else 0)

        health = Health(toy=every_other, timeout=0.05, activity=FakeActivity(WORKS), busy_timeout=0.08)
        async with running(health.monitor) as task:
            await until(lambda: health.plugins.rounds >= 8)
            assert not task.done()
        assert health.reported == []

    asyncio.run(main())


def test_outcomes_are_what_the_monitor_judges():
    """The fake above must not drift away from the real outcome."""
    assert HookOutcome("check_health", "toy", 0.1).ok


# ------------------------------------------------------------------------------------------------------------- stall

TIMEOUT = 0.5


class FakeEngine:
    def progress(self):
        return 0


class Stepping:
    steps = 0

    def progress(self):
        return self.steps


class Quiet:
    """An engine that reports no progress of its own."""


async def silent():
    await asyncio.sleep(60)


class Stall:
    def __init__(self, canary=silent, engine=None, timeout=TIMEOUT, activity=None, busy_timeout=0.0):
        self.activity = activity or FakeActivity()
        self.registry = RequestRegistry()
        self.reported = []
        self.canaries = 0
        self.cancelled = 0
        self.answer = canary
        self.started = time.monotonic()
        self.monitor = StallMonitor(
            engine or Quiet(), self.registry, self.canary, self.activity, self.report,
            timeout=timeout, busy_timeout=busy_timeout,
        )  # fmt: skip

    async def canary(self):
        self.canaries += 1
        try:
            await self.answer()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def report(self, error):
        self.reported.append((error, time.monotonic() - self.started))


def test_a_standstill_is_reported_within_the_timeout():
    async def main():
        stall = Stall()
        async with running(stall.monitor) as task:
            await asyncio.wait_for(task, 10)
        ((error, took),) = stall.reported
        assert isinstance(error, EngineStalledError)
        assert stall.canaries == 1
        assert took >= TIMEOUT * (StallMonitor.QUIET_SHARE + StallMonitor.CANARY_SHARE) - 0.02
        return took, stall

    took, stall = asyncio.run(main())
    assert took <= TIMEOUT + 0.2, "the machine may be busy, but not that busy"
    assert stall.cancelled == 1, "the canary is not left behind"


def test_the_bound_holds_by_arithmetic():
    """Quiet time, canary and the ticks between them fit into the timeout, whatever it is."""
    assert StallMonitor.QUIET_SHARE + StallMonitor.CANARY_SHARE + 3 * StallMonitor.TICK_SHARE <= 1
    assert pytest.approx(1) == StallMonitor.QUIET_SHARE + StallMonitor.CANARY_SHARE + StallMonitor.MARGIN_SHARE
    assert OBSERVED_SHARE < StallMonitor.CANARY_SHARE, "the canary itself is work, too"
    assert 2 * OBSERVED_SHARE + 3 * StallMonitor.TICK_SHARE <= 1, "from the last sign of work to the report"


def test_a_standstill_says_what_the_processes_do():
    async def main():
        stall = Stall(activity=FakeActivity(Finding(False, "process 5 (VLLM::Worker) is stopped (state T)")))
        async with running(stall.monitor) as task:
            await asyncio.wait_for(task, 10)
        ((error, _),) = stall.reported
        assert str(error) == (
            "the engine has made no progress for 0.3 s (0 requests in flight) and a canary request got no answer "
            "within 0.15 s: process 5 (VLLM::Worker) is stopped (state T)"
        )
        assert stall.activity.windows == [pytest.approx((0.1, 0.05))], "the canary itself is work, too"
        assert not stall.activity.open

    asyncio.run(main())


def test_an_engine_that_works_is_left_alone_until_its_canary_is_answered(caplog):
    """It compiles for several times the timeout, and the request that waits for it is the canary."""

    async def main():
        async def late():
            await asyncio.sleep(4 * TIMEOUT if stall.canaries == 1 else 0)

        stall = Stall(late, activity=FakeActivity(WORKS))
        async with running(stall.monitor) as task:
            await until(lambda: stall.canaries >= 2, timeout=10)
            assert not task.done()
        assert stall.reported == []
        assert stall.cancelled == 0
        assert not stall.activity.open

    asyncio.run(main())
    said = [(record.getMessage(), record.fields) for record in caplog.records if hasattr(record, "fields")]
    messages = [message for message, _ in said]
    assert messages[0] == "No progress, but the engine works"
    # The second canary may be answered before the test looks.
    assert messages[1:] in ([], ["The engine makes progress again"]), "said once"
    assert said[0][1]["sign"] == WORKS.reason


def test_an_engine_that_stops_to_work_is_reported_within_the_timeout():
    async def main():
        stall = Stall(activity=FakeActivity(*[WORKS] * 5, IDLE))
        async with running(stall.monitor) as task:
            await until(lambda: stall.activity.asked == 5, timeout=10)
            stopped = time.monotonic()
            await asyncio.wait_for(task, 10)
            assert time.monotonic() - stopped <= TIMEOUT
        ((error, took),) = stall.reported
        assert took > 1.5 * TIMEOUT
        assert str(error).endswith("s: no compiler runs")
        assert stall.canaries == stall.cancelled == 1

    asyncio.run(main())


def test_an_engine_that_works_forever_is_reported_at_the_second_bound():
    """A dead-lock that spins."""

    async def main():
        stall = Stall(activity=FakeActivity(WORKS), busy_timeout=3 * TIMEOUT)
        async with running(stall.monitor) as task:
            await asyncio.wait_for(task, 10)
        ((error, took),) = stall.reported
        assert isinstance(error, EngineStalledError)
        assert str(error).endswith("within 1.15 s, although the engine works: compiler nvcc runs (process 5)")
        return took

    took = asyncio.run(main())
    assert 3 * TIMEOUT * 0.9 <= took <= 3 * TIMEOUT + 0.2, "the machine may be busy, but not that busy"


@pytest.mark.parametrize("busy_timeout", [TIMEOUT / 2, TIMEOUT])
def test_a_second_bound_that_is_no_longer_gives_no_time(busy_timeout):
    async def main():
        stall = Stall(activity=FakeActivity(WORKS), busy_timeout=busy_timeout)
        async with running(stall.monitor) as task:
            await asyncio.wait_for(task, 10)
        ((_, took),) = stall.reported
        return took

    assert asyncio.run(main()) <= TIMEOUT + 0.2, "the machine may be busy, but not that busy"


def test_progress_ends_the_patience_with_an_engine_that_works(caplog):
    async def main():
        stall = Stall(activity=FakeActivity(WORKS), busy_timeout=2 * TIMEOUT)
        async with running(stall.monitor) as task:
            for canaries in (1, 2, 3):
                await until(lambda: stall.activity.asked >= 2, timeout=10)
                assert stall.canaries == canaries
                stall.registry.chunks += 1
                stall.activity.asked = 0
            await until(lambda: stall.cancelled == 3)
            assert not task.done()
        assert stall.reported == []

    caplog.set_level("INFO")
    asyncio.run(main())
    assert caplog.text.count("The engine makes progress again") == 3


async def busy_for(stall, seconds, step):
    async with running(stall.monitor) as task:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step()
            await asyncio.sleep(TIMEOUT / 10)
        assert not task.done()
    assert stall.reported == []


def test_chunks_of_any_request_are_progress():
    async def main():
        stall = Stall()
        await busy_for(stall, 2 * TIMEOUT, lambda: setattr(stall.registry, "chunks", stall.registry.chunks + 1))
        assert stall.canaries == 0, "a busy engine is not asked"

    asyncio.run(main())


def test_steps_without_tokens_are_progress():
    """A long prefill: no chunk for minutes, but the engine says that it works."""

    async def main():
        engine = Stepping()
        stall = Stall(engine=engine)
        await busy_for(stall, 2 * TIMEOUT, lambda: setattr(engine, "steps", engine.steps + 1))
        assert stall.canaries == 0

    asyncio.run(main())


def test_a_paused_engine_is_left_alone_until_it_goes_on():
    async def main():
        engine = Pausing()
        stall = Stall(engine=engine)
        async with running(stall.monitor) as task:
            await asyncio.sleep(2 * TIMEOUT)
            assert stall.canaries == 0
            engine.now = False
            await until(lambda: stall.canaries)
            engine.now = True  # while it is asked
            await asyncio.sleep(TIMEOUT)
            assert stall.reported == []
            engine.now = False
            await asyncio.wait_for(task, 10)
        assert isinstance(stall.reported[0][0], EngineStalledError)

    asyncio.run(main())


def test_an_idle_engine_that_answers_is_alive():
    async def main():
        async def answer():
            await asyncio.sleep(0.01)

        stall = Stall(answer)
        async with running(stall.monitor) as task:
            await until(lambda: stall.canaries >= 2)
            assert not task.done()
        assert stall.reported == []

    asyncio.run(main())


def test_progress_of_others_vouches_for_an_engine_whose_canary_waits():
    """A saturated engine: the canary stands in the queue behind a thousand requests that move."""

    async def main():
        stall = Stall()
        async with running(stall.monitor) as task:
            for _ in range(2):
                before = stall.canaries
                await until(lambda before=before: stall.canaries > before)
                stall.registry.chunks += 1
                await asyncio.sleep(TIMEOUT * StallMonitor.CANARY_SHARE)
                assert not task.done()
        assert stall.reported == []
        assert stall.cancelled >= 1

    asyncio.run(main())


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, PanicException])
def test_a_canary_that_fails_shows_an_engine_that_answers(caplog, error):
    async def main():
        async def refuse():
            raise error("max_tokens must be 2 here")

        stall = Stall(refuse)
        async with running(stall.monitor) as task:
            await until(lambda: stall.canaries >= 2)
            assert not task.done()
        assert stall.reported == []

    asyncio.run(main())
    assert "Canary request failed" in caplog.text
    fields = [record.fields for record in caplog.records if record.getMessage() == "Canary request failed"]
    assert f"{error.__name__}: max_tokens must be 2 here" in fields[0]["error"]


def test_a_canary_that_is_cancelled_from_within_does_not_end_the_watch():
    async def main():
        async def cancelled():
            raise asyncio.CancelledError

        stall = Stall(cancelled)
        async with running(stall.monitor) as task:
            await until(lambda: stall.canaries >= 2)
            assert not task.done()
        assert stall.reported == []

    asyncio.run(main())


def test_a_canary_that_finds_the_engine_dead_is_fatal():
    async def main():
        death = EngineDeadError("the core has closed its connection")

        async def die():
            raise death

        stall = Stall(die)
        async with running(stall.monitor) as task:
            await asyncio.wait_for(task, 10)
        ((error, _),) = stall.reported
        assert error is death

    asyncio.run(main())


def test_a_loop_that_was_held_up_is_not_blamed_on_the_engine_while_it_is_quiet():
    async def main():
        async def answer():
            await asyncio.sleep(0)

        stall = Stall(answer)
        async with running(stall.monitor) as task:
            await asyncio.sleep(TIMEOUT * 0.1)
            time.sleep(2 * TIMEOUT)
            await asyncio.sleep(TIMEOUT * 0.1)
            assert stall.canaries == 0, "no time has passed in which a chunk could have arrived"
            assert not task.done()
        assert stall.reported == []

    asyncio.run(main())


def test_a_loop_that_was_held_up_is_not_blamed_on_the_engine_while_the_canary_is_out():
    """The answer may be there, waiting for the loop to read it."""

    async def main():
        async def answer():
            await asyncio.sleep(0.01)
            time.sleep(2 * TIMEOUT * StallMonitor.CANARY_SHARE)
            for _ in range(20):  # as many turns as an answer takes from the socket to the stream
                await asyncio.sleep(0)

        stall = Stall(answer)
        async with running(stall.monitor) as task:
            await until(lambda: stall.canaries >= 2, timeout=10)
            assert not task.done()
        assert stall.reported == []

    asyncio.run(main())


# --------------------------------------------------------------------------------------------------------- heartbeat


class FakeControl:
    def __init__(self):
        self.sent = []

    def send(self, message_type, **fields):
        self.sent.append((time.monotonic(), message_type, fields))


def test_the_heart_beats_several_times_within_the_timeout():
    async def main():
        registry, control = RequestRegistry(), FakeControl()
        registry.admit("r", graceful=True)
        async with running(Heartbeat(control, registry, WorkerMetrics(registry), timeout=0.5)):
            await until(lambda: len(control.sent) >= 4)
        assert {kind for _, kind, _ in control.sent} == {"heartbeat"}
        for _, _, fields in control.sent:
            assert (fields["in_flight"], fields["counts"], fields["chunks"]) == (1, {}, 0)
            assert fields["lag"] >= 0
        assert control.sent[0][0] + 0.5 > control.sent[2][0], "three within one timeout, even when one is late"

    asyncio.run(main())


def test_a_late_loop_shows_in_the_metrics():
    async def main():
        registry, control = RequestRegistry(), FakeControl()
        metrics = WorkerMetrics(registry)
        async with running(Heartbeat(control, registry, metrics, timeout=0.25)):
            await until(lambda: control.sent)
            time.sleep(0.3)
            await until(lambda: len(control.sent) >= 2)
            lag = next(
                float(line.split()[1])
                for line in metrics.exposition().splitlines()
                if line.startswith("dynamo_worker_event_loop_lag_seconds ")
            )
        assert 0.2 < lag < 2

    asyncio.run(main())


def test_a_block_is_logged_when_it_is_over(caplog, monkeypatch):
    async def main():
        monkeypatch.setattr(Heartbeat, "BLOCKED_SECONDS", 0.1)
        registry, control = RequestRegistry(), FakeControl()
        metrics = WorkerMetrics(registry)
        async with running(Heartbeat(control, registry, metrics, timeout=0.25)):
            await until(lambda: len(control.sent) >= 2)
            assert not caplog.records
            time.sleep(0.3)
            await until(lambda: len(control.sent) >= 4)
        assert "The event loop was blocked" in caplog.text
        counts = [line for line in metrics.exposition().splitlines() if "delay_seconds_count" in line]
        assert float(counts[0].split()[1]) >= 3

    asyncio.run(main())


def test_without_a_timeout_the_heart_still_beats():
    async def main():
        registry, control = RequestRegistry(), FakeControl()
        async with running(Heartbeat(control, registry, WorkerMetrics(registry), timeout=0)):
            await settle()
        assert len(control.sent) == 1

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- frontend


class Answering:
    """Stands in for a frontend's check; `answer` decides what it does."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0

    async def __call__(self):
        self.asked += 1
        await self.answer()


async def speak():
    await asyncio.sleep(0)


async def refuse():
    raise ConnectionRefusedError


async def never():
    await asyncio.Event().wait()


@pytest.mark.parametrize("answer", [speak, refuse])
def test_a_frontend_that_answers_anything_is_asked_again(answer):
    async def main():
        reported, check = [], Answering(answer)
        async with running(FrontendMonitor(check, reported.append, interval=0.01, timeout=1)):
            await until(lambda: check.asked > 3)
        assert reported == []

    asyncio.run(main())


def test_a_frontend_that_does_not_answer_is_reported():
    async def main():
        reported, check = [], Answering(never)
        async with running(FrontendMonitor(check, reported.append, interval=0.01, timeout=0.2)) as task:
            await until(task.done)
        (error,) = reported
        assert isinstance(error, WorkerError)
        assert str(error) == "the frontend has not answered for 0.2 s"
        assert check.asked == 1

    asyncio.run(main())


def test_a_frontend_is_not_blamed_for_time_in_which_the_worker_itself_did_not_run():
    async def main():
        reported, answered = [], asyncio.Event()
        check = Answering(answered.wait)
        async with running(FrontendMonitor(check, reported.append, interval=0.01, timeout=2)):
            await until(lambda: check.asked == 1)
            time.sleep(2.5)
            answered.set()
            await until(lambda: check.asked > 1)
        assert reported == []

    asyncio.run(main())
