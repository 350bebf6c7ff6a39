"""Requests to stop: one is graceful, two are quick, three are at once."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from aio import until
from dynamo.llm.exceptions import EngineShutdown
from worker_world import GRACEFUL, stop_itself, stop_when_serving

from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host import launcher as module
from dynamo_worker.host import stop_requests
from dynamo_worker.supervisor.protocol import RUN_DIR


def test_a_second_signal_hands_off_and_is_quick(world):
    async def scenario(world):
        running = await world.busy()
        world.stop()
        await until(lambda: world.launcher._state.value == "DRAINING")
        world.stop(2)
        with pytest.raises(EngineShutdown):
            await running

    assert world.run(scenario) == 128 + signal.SIGTERM
    assert world.states == [*GRACEFUL[:5], "CLEANUP", "STOPPED"]
    assert world.reason == "forced to stop by a second SIGTERM"
    assert world.took < 2
    assert "cleanup" in world.happened


def test_the_forced_deadline_is_announced(world):
    at = []

    async def scenario(world):
        await world.busy()
        world.stop()
        at.append(world.stop(2, "SIGINT"))

    assert world.run(scenario) == 128 + signal.SIGINT
    (message,) = [message for message in world.messages if message.get("state") == "CLEANUP"]
    assert message["deadline"] == pytest.approx(at[0] + 2)


def test_two_signals_at_once_skip_nothing_that_matters(world):
    """The first stage is left before it has begun: out of discovery all the same."""

    async def scenario(world):
        await world.busy()
        world.stop()
        world.stop(2)

    assert world.run(scenario) == 128 + signal.SIGTERM
    assert world.order("not ready", "unregistered", "runtime shut down", "cleanup")


def test_a_second_signal_during_the_clean_up_changes_the_exit_code(world):
    async def scenario(world):
        world.plugins.hooks["cleanup"] = lambda: asyncio.sleep(0.2)
        await stop_when_serving(world)
        await until(lambda: "cleanup" in world.happened)
        world.stop(2)

    assert world.run(scenario) == 128 + signal.SIGTERM


def test_a_forced_stop_during_the_start(world):
    async def slow(worker_id):
        await asyncio.sleep(60)

    world.engine.start = slow

    async def scenario(world):
        await until(lambda: "engine created" in world.happened)
        world.stop()
        world.stop(2)

    assert world.run(scenario) == 128 + signal.SIGTERM
    assert world.took < 3


def test_a_third_signal_ends_the_process_at_once(world, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    async def scenario(world):
        await world.busy()
        world.stop(3)
        await until(lambda: codes)
        world.launcher._events.put_nowait(module.Event.FORCE_STOP_REQUESTED)

    world.run(scenario)
    assert codes == [128 + signal.SIGTERM]


def test_without_a_supervisor_signals_go_to_the_worker_itself(world, caplog):
    caplog.set_level("INFO")
    world.supervised = False

    async def scenario(world):
        await world.serving()
        assert world.context.private_dir.is_dir()
        assert not world.context.supervised
        os.kill(os.getpid(), signal.SIGTERM)

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.reason == "stopped by SIGTERM"
    assert not world.context.private_dir.exists(), "it removes what nobody else would"
    (record,) = [record for record in caplog.records if record.getMessage() == "Received shutdown signal"]
    assert "again to stop within 2 s" in record.fields["next"]


def test_with_a_supervisor_the_private_directory_is_the_supervisors(world):
    async def scenario(world):
        await world.serving()
        assert world.context.private_dir == world.run_dir
        assert world.context.component == "dynamo.backend"
        world.stop()

    world.run(scenario)
    assert world.run_dir.exists()


def test_without_a_supervisor_a_forced_stop_ends_even_if_nothing_answers(world, monkeypatch):
    world.supervised = False
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(stop_requests, "FORCED_STOP", 0.1)

    async def scenario(world):
        await world.serving()

        async def cleanup():
            await until(lambda: codes)  # it would never end

        world.plugins.hooks["cleanup"] = cleanup
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.11)

    assert world.run(scenario) == 128 + signal.SIGINT
    assert codes == [128 + signal.SIGINT]


@pytest.mark.parametrize("numbers", [(signal.SIGHUP,), (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)])
def test_without_a_supervisor_each_signal_stops_it_gracefully_and_several_at_once_count_once(world, numbers):
    world.supervised = False

    async def scenario(world):
        await world.serving()
        for number in numbers:
            os.kill(os.getpid(), number)

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.order("runtime shut down", "cleanup")


def test_without_a_supervisor_sigquit_dumps_and_forces(world, capfd):
    world.supervised = False

    async def scenario(world):
        await world.serving()
        os.kill(os.getpid(), signal.SIGQUIT)

    assert world.run(scenario) == 128 + signal.SIGQUIT
    assert "most recent call first" in capfd.readouterr().err


def test_a_hangup_that_was_ignored_stays_ignored(world):
    """As `nohup` has it."""
    world.supervised = False
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def scenario(world):
        await world.serving()
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        assert world.launcher._state.value == "SERVING"
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        assert world.run(scenario) == ExitCode.STOPPED
        assert world.reason == "stopped by SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_directory_without_a_supervisor_is_not_ours_to_remove(world, monkeypatch):
    """The variable may be inherited from another worker."""
    world.supervised = False
    monkeypatch.setenv(RUN_DIR, str(world.run_dir))
    (world.run_dir / "of-another-worker").touch()
    assert world.run(stop_itself) == ExitCode.STOPPED
    assert (world.run_dir / "of-another-worker").exists()
