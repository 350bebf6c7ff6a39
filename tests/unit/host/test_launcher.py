"""The launcher executes the state table: what happens in which order, and with which exit code it ends."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import threading
import time

import pytest
import uvloop
from aio import until
from dynamo.llm.exceptions import EngineShutdown, WorkerUnavailable
from worker_world import FATAL, GRACEFUL, NO_EXCEPTIONS, FakeRuntime, child, nothing, raising, stop_when_serving

from dynamo_worker.errors import EngineDeadError, StartError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host import launcher as module
from dynamo_worker.host.monitors import threads
from dynamo_worker.supervisor import ledger


def test_a_graceful_life(world):
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert world.states == GRACEFUL
    assert world.reason == "stopped by SIGTERM"
    assert world.happened == [
        "engine created",
        "engine started",
        "recorded",
        "served generate",
        "registered",
        "closed to others",
        "ready",
        "on_ready",
        "not ready",
        "unregistered",
        "drain",
        "runtime shut down",
        "cleanup",
    ]
    assert world.took < 5


def test_the_deadline_is_announced_as_soon_as_it_is_known(world):
    at = []

    async def scenario(world):
        await world.serving()
        at.append(world.stop(signal_name="SIGINT"))

    assert world.run(scenario) == ExitCode.STOPPED
    deadlines = {message["state"]: message["deadline"] for message in world.messages if message["type"] == "state"}
    assert deadlines["SERVING"] is None
    for state in GRACEFUL[2:]:
        assert deadlines[state] == pytest.approx(at[0] + 30 - 2)
    assert world.reason == "stopped by SIGINT"


def test_the_grace_period_still_serves(world):
    world.settings["grace_period"] = 0.3

    async def scenario(world):
        await world.serving()
        world.stop()
        await until(lambda: world.launcher._state.value == "GRACE")
        assert [chunk["token_ids"] for chunk in await world.request()] == [[1], [2]]
        assert "drain" not in world.happened

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.took >= 0.3


def test_it_beats_while_it_serves(world):
    world.settings["heartbeat_timeout"] = 1

    async def scenario(world):
        await world.serving()
        await until(lambda: len([m for m in world.read() if m["type"] == "heartbeat"]) >= 3)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED


def test_messages_it_does_not_know_are_ignored(world):
    async def scenario(world):
        await world.serving()
        world.supervisor.send("future", level=3)
        world.stop()
        world.stop()  # said twice

    assert world.run(scenario) == ExitCode.STOPPED


def test_metrics_follow_the_life(world):
    async def scenario(world):
        await world.serving()
        assert 'dynamo_worker_state{state="SERVING"} 1.0' in world.runtime.exposition()
        world.stop()

    world.run(scenario)
    shown = world.runtime.exposition()
    assert 'dynamo_worker_state{state="STOPPED"} 1.0' in shown
    for state in ("STARTING", "UNREGISTERING", "GRACE", "DRAINING", "CLEANUP"):
        assert f'dynamo_worker_shutdown_stage_seconds{{stage="{state}"}}' in shown


@pytest.mark.parametrize("stops", [False, True])
def test_without_threads_a_worker_gives_requests_away_unless_it_stops_anyway(world, monkeypatch, stops):
    """Nobody else may be there to take them, and those that run need no further thread."""
    available = [True]
    monkeypatch.setattr(threads, "can_start_thread", lambda: available[-1])

    async def scenario(world):
        world.engine.hold = asyncio.Event()
        await world.serving()
        request = world.request()
        await until(lambda: len(world.launcher._requests) == 1)
        if stops:
            world.stop()
            await until(lambda: world.launcher._state.value == "DRAINING")
        available.append(False)
        await asyncio.sleep(0.2)
        assert request.done() == (not stops)
        world.engine.hold.set()
        await asyncio.wait({request})

    assert world.run(scenario) == (ExitCode.STOPPED if stops else ExitCode.FATAL)
    assert ("no thread can be started" in (world.reason or "")) == (not stops)


@pytest.mark.parametrize("error", NO_EXCEPTIONS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("fatal", [False, True], ids=["stop", "fatal"])
@pytest.mark.parametrize("place", ["set_ready", "unregister", "shutdown"])
def test_no_exception_of_the_runtime_keeps_a_stop_from_going_on(world, monkeypatch, place, error, fatal):
    async def scenario(world):
        await world.serving()
        monkeypatch.setattr(FakeRuntime, place, raising(error, later=place != "set_ready"))
        if fatal:
            world.launcher._on_fatal(EngineDeadError("dead"))
        else:
            world.stop()

    assert world.run(scenario) == (ExitCode.FATAL if fatal else ExitCode.STOPPED)
    assert world.reason == ("dead" if fatal else "stopped by SIGTERM")
    assert world.states == (FATAL if fatal else GRACEFUL)
    assert "cleanup" in world.happened
    assert ("on_fatal_error" in world.happened) == fatal
    assert world.took < 3


@pytest.mark.parametrize("error", NO_EXCEPTIONS, ids=lambda error: error.__name__)
def test_a_monitor_that_is_ended_by_its_engine_is_not_silent(world, caplog, error):
    world.settings["stall_timeout"] = 1
    world.engine.progress = lambda: 0

    async def scenario(world):
        await world.serving()
        world.engine.progress = raising(error)
        await until(lambda: "Monitor failed" in caplog.text)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED


class FakeLauncher:
    """Lives until something was reported that has escaped."""

    reason = "stopped"

    def __init__(self, work):
        self.work = work
        self.escaped = []
        self.seen = asyncio.Event()

    async def run(self):
        task = asyncio.ensure_future(self.work())
        await self.seen.wait()
        task.exception()
        return 7

    def on_escaped(self, error):
        self.escaped.append(error)
        self.seen.set()


@pytest.mark.parametrize("new_event_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_the_loop_goes_on_when_a_task_wants_to_end_the_interpreter(new_event_loop, error):
    async def work():
        raise error

    with contextlib.closing(new_event_loop()) as loop:
        launcher = FakeLauncher(work)
        assert module._run_until_stopped(loop, launcher) == 7
        assert [type(escaped) for escaped in launcher.escaped] == [error]


@pytest.mark.parametrize("error", [*NO_EXCEPTIONS, ZeroDivisionError], ids=lambda error: error.__name__)
def test_a_bug_of_ours_has_an_exit_code_and_a_reason(error, capsys):
    class Broken:
        async def run(self):
            raise error

    with contextlib.closing(uvloop.new_event_loop()) as loop:
        launcher = Broken()
        assert module._run_until_stopped(loop, launcher) == ExitCode.FATAL
    assert launcher.reason.startswith(f"bug in dynamo-worker: {error.__name__}")
    assert "please report it" in capsys.readouterr().err


def test_the_registration_is_recorded_for_the_supervisor(world):
    async def scenario(world):
        await world.serving()
        assert len(ledger.registrations(world.run_dir)) == 1
        world.stop()

    world.run(scenario)


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_what_could_not_be_withdrawn_is_left_to_the_supervisor(world, trouble):
    async def scenario(world):
        if trouble == "hangs":
            world.runtime.unregister_seconds = 60
        else:
            world.runtime.withdrawn = False
        await stop_when_serving(world)

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.states == GRACEFUL
    assert len(ledger.registrations(world.run_dir)) == 1
    assert world.took < 4


def test_a_runtime_that_ends_by_itself_is_the_loss_of_discovery(world):
    async def scenario(world):
        await world.serving()
        world.runtime.closed.set()

    assert world.run(scenario) == ExitCode.FATAL
    assert world.states == FATAL
    assert "mem discovery" in world.reason


def test_an_endpoint_that_fails_while_serving_is_no_failed_start(world):
    """Exit code 3 would keep systemd from restarting a worker that has served well until now."""

    async def scenario(world):
        await world.serving()
        world.runtime.serve_error = RuntimeError("address in use")
        world.runtime.closed.set()

    assert world.run(scenario) == ExitCode.FATAL
    assert world.states == FATAL
    assert world.reason == "the endpoint 'generate' failed: address in use"
    assert world.order("on_fatal_error", "runtime shut down", "cleanup")


def test_an_endpoint_that_cannot_be_served_is_a_failed_start(world, monkeypatch):
    async def register(runtime, info, *, endpoint):
        runtime.serve_error = RuntimeError("address in use")
        runtime.closed.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeRuntime, "register", register)
    assert world.run(nothing) == ExitCode.START_FAILED
    assert world.states == ["STARTING", "FATAL", "STOPPED"]
    assert world.reason == "the endpoint 'generate' failed: address in use"


@pytest.mark.parametrize("failed", [False, True])
def test_an_endpoint_that_ends_during_the_grace_period(world, failed):
    world.settings["grace_period"] = 5

    async def scenario(world):
        await world.serving()
        world.stop()
        await until(lambda: world.launcher._state.value == "GRACE")
        world.runtime.serve_error = RuntimeError("address in use") if failed else None
        world.runtime.closed.set()

    assert world.run(scenario) == ExitCode.FATAL
    assert world.states == [*GRACEFUL[:4], "FATAL", "STOPPED"]
    assert ("address in use" if failed else "mem discovery") in world.reason


def test_a_stop_during_the_start(world):
    async def slow(worker_id):
        try:
            await asyncio.sleep(60)
        finally:
            world.note("start cancelled")

    world.engine.start = slow

    async def scenario(world):
        await until(lambda: "engine created" in world.happened)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.states == ["STARTING", "CLEANUP", "STOPPED"]
    assert world.reason == "stopped during the start"
    assert world.order("start cancelled", "runtime shut down", "cleanup")
    assert world.took < 2


def test_a_stop_during_the_start_has_little_time(world):
    """Nothing is in flight: the termination grace period is for requests."""

    async def slow(worker_id):
        await asyncio.sleep(60)

    world.engine.start = slow
    world.plugins.hooks["cleanup"] = lambda: asyncio.sleep(60)
    stopped = []

    async def scenario(world):
        await until(lambda: "engine created" in world.happened)
        stopped.append(world.stop())

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.took < 5
    (message,) = [message for message in world.messages if message.get("state") == "CLEANUP"]
    assert message["deadline"] == pytest.approx(stopped[0] + 2)


def test_a_stop_during_a_start_that_ignores_its_cancellation(world, monkeypatch):
    monkeypatch.setattr(module, "_CANCEL_SECONDS", 0.1)
    go_on = []

    async def stubborn(worker_id):
        while not go_on:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        raise RuntimeError("too late to matter")

    world.engine.start = stubborn

    async def cleanup():
        go_on.append(True)
        await asyncio.sleep(0.05)

    world.plugins.hooks["cleanup"] = cleanup

    async def scenario(world):
        await until(lambda: "engine created" in world.happened)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.states == ["STARTING", "CLEANUP", "STOPPED"]


def test_an_engine_process_that_dies(world):
    with child() as process:
        world.engine.pids = [process.pid]

        async def scenario(world):
            running = await world.busy()
            process.kill()
            with pytest.raises(EngineShutdown):
                await running
            assert world.order("not ready", "unregistered"), "out of discovery before requests are handed off"
            with pytest.raises(WorkerUnavailable):
                await world.request("late")

        assert world.run(scenario) == ExitCode.FATAL
    assert world.states == FATAL
    assert f"engine process {process.pid}" in world.reason
    assert "killed by SIGKILL" in world.reason
    assert world.order("unregistered", "on_fatal_error", "runtime shut down", "cleanup")
    (error,) = world.plugins.fatal
    assert isinstance(error, EngineDeadError)
    assert 'dynamo_worker_fatal_errors_total{kind="EngineDeadError"} 1.0' in world.runtime.exposition()


def test_the_first_error_is_the_cause(world):
    """A dead core also breaks the start that waits for it: that is a consequence."""

    async def start(worker_id):
        world.launcher._on_fatal(EngineDeadError("engine process 7 died: killed by SIGKILL"))
        raise StartError("the connection is closed")

    world.engine.start = start
    assert world.run(nothing) == ExitCode.START_FAILED
    assert world.reason == "engine process 7 died: killed by SIGKILL"


def test_a_process_that_dies_during_the_start(world):
    with child() as process:
        world.engine.pids = [process.pid]

        async def generate(request, context):
            process.kill()
            await asyncio.sleep(60)
            yield {}

        world.engine.generate = generate
        assert world.run(nothing) == ExitCode.START_FAILED
    assert "killed by SIGKILL" in world.reason
    assert world.took < 3


def test_what_follows_an_error_does_not_replace_it(world):
    async def scenario(world):
        await world.serving()
        world.launcher._on_fatal(EngineDeadError("out of memory", hint="smaller batches"))
        world.launcher._on_fatal(EngineDeadError("a consequence"))

    assert world.run(scenario) == ExitCode.FATAL
    assert world.reason == "out of memory", "the hint is for the log"


def test_a_request_that_finds_the_engine_dead_ends_the_worker(world):
    async def generate(request, context):
        if not context.id().startswith("canary"):
            raise EngineDeadError("out of memory")
        yield {"token_ids": [1], "finish_reason": "stop"}

    world.engine.generate = generate

    async def scenario(world):
        await world.serving()
        with pytest.raises(EngineShutdown):
            await world.request()

    assert world.run(scenario) == ExitCode.FATAL
    assert world.reason == "out of memory"


def test_a_health_check_that_finds_the_engine_dead_ends_the_worker(world):
    async def scenario(world):
        await world.serving()

        async def dead():
            raise EngineDeadError("heart stopped")

        world.plugins.hooks["check_health"] = dead

    assert world.run(scenario) == ExitCode.FATAL
    assert world.reason == "heart stopped"


def test_an_engine_that_stalls_ends_the_worker(world):
    world.settings["stall_timeout"] = 1

    async def scenario(world):
        await world.serving()

        async def hang(request, context):
            await asyncio.sleep(60)
            yield {}

        world.engine.generate = hang

    assert world.run(scenario) == ExitCode.FATAL
    assert "no progress" in world.reason
    assert world.took < 3
    assert world.engine.aborted, "the canary"


def test_a_monitor_that_fails_is_not_silent(world, caplog):
    world.settings["stall_timeout"] = 1

    def progress():
        raise AttributeError("steps")

    world.engine.progress = progress

    async def scenario(world):
        await world.serving()
        await until(lambda: "Monitor failed" in caplog.text)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED


def test_last_words_have_a_deadline(world):
    seen = []

    async def on_fatal_error(engine, error, deadline):
        seen.append(deadline.remaining())

    world.plugins.on_fatal_error = on_fatal_error

    async def scenario(world):
        await world.serving()
        world.launcher._on_fatal(EngineDeadError("dead"))

    assert world.run(scenario) == ExitCode.FATAL
    assert 0 < seen[0] <= 2


def test_a_stop_does_not_hide_a_fatal_error(world):
    async def scenario(world):
        await world.serving()
        world.plugins.hooks["on_fatal_error"] = lambda: asyncio.sleep(0.2)
        world.launcher._on_fatal(EngineDeadError("dead"))
        await until(lambda: "on_fatal_error" in world.happened)
        world.stop()

    assert world.run(scenario) == ExitCode.FATAL
    assert world.reason == "dead"


def test_a_fatal_error_during_a_drain_ends_it(world):
    async def scenario(world):
        running = await world.busy()
        world.stop()
        await until(lambda: world.launcher._state.value == "DRAINING")
        world.launcher._on_fatal(EngineDeadError("dead"))
        with pytest.raises(EngineShutdown):
            await running

    assert world.run(scenario) == ExitCode.FATAL
    assert world.states == [*GRACEFUL[:5], "FATAL", "STOPPED"]


@pytest.mark.parametrize("state", ["UNREGISTERING", "GRACE", "DRAINING"])
@pytest.mark.parametrize("found_by", ["request", "process"])
def test_an_engine_that_dies_during_a_stop_is_not_silent(world, monkeypatch, state, found_by):
    """Its requests end at once: nothing is in flight any more, as if it had been drained."""
    monkeypatch.setattr(module, "_DEATH_SECONDS", 5.0)  # the moment that the machine needs while it runs tests
    world.settings |= {"grace_period": 0.3}
    broken = asyncio.Event()

    async def generate(request, context):
        yield {"token_ids": [1], "finish_reason": "stop" if context.id().startswith("canary") else None}
        if not context.id().startswith("canary"):
            await broken.wait()
            if found_by == "request":
                raise EngineDeadError("the connection to the core is closed")
            raise ConnectionResetError("the connection to the core is closed")

    world.engine.generate = generate

    async def scenario(world):
        with child() as process:
            world.engine.pids = [process.pid]
            await world.serving()
            world.runtime.unregister_seconds = 0.3
            running = world.request()
            await until(lambda: len(world.launcher._requests) == 1)
            world.stop()
            await until(lambda: world.launcher._state.value == state)
            broken.set()
            with pytest.raises((EngineShutdown, ConnectionResetError)):
                await running
            # The kernel closes the connections of a dying process a moment before its pidfd tells of the death.
            if found_by == "process":
                process.kill()
            await until(lambda: world.launcher._state.value in ("FATAL", "STOPPED"))

    assert world.run(scenario) == ExitCode.FATAL
    assert world.states == [*GRACEFUL[: GRACEFUL.index(state) + 1], "FATAL", "STOPPED"]
    assert ("killed by SIGKILL" if found_by == "process" else "the connection to the core") in world.reason
    assert world.happened.count("unregistered") == 1


def test_an_error_during_the_clean_up_is_no_news(world):
    async def scenario(world):
        async def cleanup():
            world.launcher._on_fatal(EngineDeadError("of course it is"))

        world.plugins.hooks["cleanup"] = cleanup
        await stop_when_serving(world)

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.states == GRACEFUL


def test_the_last_flush_does_not_wait_for_a_thread_that_dies_at_birth(monkeypatch):
    """For want of memory, say: `threading.Thread.start` waits for its first sign of life without end."""

    class Stream:
        def drain(self, timeout):
            self.drained = True

    monkeypatch.setattr(module, "_LAST_OUTPUT", 0.1)
    monkeypatch.setattr(_thread, "start_new_thread", lambda function, arguments: 1)
    monkeypatch.setattr(threading, "_start_new_thread", lambda function, arguments: 1, raising=False)
    stream, since = Stream(), time.monotonic()
    module._flush(stream)
    assert time.monotonic() - since < 5
    assert stream.drained
