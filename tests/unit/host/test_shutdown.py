"""A shutdown ends requests as the drain mode says, and releases everything under a deadline."""

from __future__ import annotations

import asyncio
import signal

import pytest
from aio import until
from dynamo.llm.exceptions import Cancelled, EngineShutdown, WorkerUnavailable
from worker_world import GRACEFUL, stop_when_serving

from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import EngineDeadError
from dynamo_worker.exit_codes import ExitCode


def test_requests_in_flight_finish_and_new_ones_are_refused(world):
    async def scenario(world):
        running = await world.busy()
        world.stop()
        await until(lambda: world.launcher._state.value == "DRAINING")
        with pytest.raises(WorkerUnavailable):
            await world.request("late")
        await asyncio.sleep(0.05)
        assert not running.done()
        assert "runtime shut down" not in world.happened
        world.engine.hold.set()
        assert [chunk["token_ids"] for chunk in await running] == [[1], [2]]

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.engine.aborted == []


def test_what_does_not_finish_in_time_is_handed_off(world):
    # 2 s for the supervisor, 1 s for leaving discovery, 0.2 s for the clean-up: 0.4 s to drain (the first is not used).
    world.settings |= {"termination_grace_period": 3.6, "engine_shutdown_timeout": 0.2}

    async def scenario(world):
        running = await world.busy()
        world.stop()
        with pytest.raises(EngineShutdown):
            await running

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.states == GRACEFUL
    assert 1 <= world.took < 1.6 + 1
    assert world.engine.aborted == ["r"]


@pytest.mark.parametrize(("mode", "error"), [("handoff", EngineShutdown), ("abort", Cancelled)])
def test_drain_modes_that_do_not_wait(world, mode, error):
    world.settings["drain"] = mode

    async def scenario(world):
        running = await world.busy()
        world.stop()
        with pytest.raises(error):
            await running

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.states == GRACEFUL
    assert world.took < 3


def test_endpoints_without_a_graceful_shutdown_are_handed_off_when_the_drain_starts(world):
    world.engine.info = EngineInfo("toy", "/m", endpoints=[EndpointSpec("hasty", graceful_shutdown=False)])

    async def scenario(world):
        running = await world.busy()
        hasty = world.request("hasty", endpoint="hasty")
        await until(lambda: len(world.launcher._requests) == 2)
        world.stop()
        with pytest.raises(EngineShutdown):
            await hasty
        assert not running.done()
        world.engine.hold.set()
        await running

    assert world.run(scenario) == ExitCode.STOPPED


@pytest.mark.parametrize(
    ("supervised", "hint"),
    [
        (True, "the registration is withdrawn by the supervisor at the end"),
        (False, "the registration expires after the exit"),
    ],
    ids=["supervised", "alone"],
)
def test_discovery_that_does_not_answer(world, caplog, supervised, hint):
    world.supervised = supervised

    async def scenario(world):
        await world.serving()
        world.runtime.unregister_seconds = 60
        if supervised:
            world.stop()
        else:
            world.launcher._stop._on_signal(signal.SIGTERM)

    assert world.run(scenario) == ExitCode.STOPPED
    hints = [record.fields["next"] for record in caplog.records if record.getMessage() == "Discovery did not answer"]
    assert set(hints) == {hint}


def test_a_drain_hook_that_hangs_is_bounded(world):
    world.settings |= {"termination_grace_period": 4.4, "engine_shutdown_timeout": 1.0}
    world.plugins.hooks["drain"] = lambda: asyncio.sleep(60)
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert world.took < 4.4
    assert world.order("drain", "runtime shut down", "cleanup")


def test_a_cleanup_hook_that_hangs_is_bounded(world):
    world.settings["engine_shutdown_timeout"] = 0.2
    world.plugins.hooks["cleanup"] = lambda: asyncio.sleep(60)
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert world.took < 3


@pytest.mark.parametrize("fatal", [False, True], ids=["stop", "fatal error"])
def test_nobody_asks_an_engine_how_it_is_while_it_is_taken_down(world, fatal):
    asked = []

    async def check_health():
        asked.append(len(world.happened))

    async def cleanup():
        asked.clear()
        await asyncio.sleep(0.1)  # five intervals

    world.plugins.hooks |= {"check_health": check_health, "cleanup": cleanup}

    async def scenario(world):
        await world.serving()
        await until(lambda: asked)
        if fatal:
            world.launcher._on_fatal(EngineDeadError("dead"))
        else:
            world.stop()

    world.run(scenario)
    assert asked == []


def test_a_bug_in_a_stage_does_not_stop_the_shutdown(world, caplog):
    async def fail():
        raise ZeroDivisionError

    world.plugins.hooks["cleanup"] = fail
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert world.states == GRACEFUL
    assert "Shutdown step failed" in caplog.text
