"""The launcher executes the state table: what happens in which order, and with which exit code it ends."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from aio import settle, until
from dynamo.llm.exceptions import Cancelled, EngineShutdown, InvalidArgument, WorkerUnavailable
from dynamo.runtime import Context
from fakes import FakeDiscovery
from prometheus_client import CollectorRegistry, Gauge

from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import EngineDeadError, StartError, UsageError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host import embedded_frontend, startup, stop_requests, threads
from dynamo_worker.host import launcher as module
from dynamo_worker.host.calling import HookOutcome
from dynamo_worker.host.launcher import Launcher
from dynamo_worker.host.settings import WorkerSettings
from dynamo_worker.host.supervisor_channel import SupervisorChannel
from dynamo_worker.supervisor import ledger
from dynamo_worker.supervisor.channel import Channel, pair
from dynamo_worker.supervisor.protocol import RUN_DIR

GRACEFUL = ["STARTING", "SERVING", "UNREGISTERING", "GRACE", "DRAINING", "CLEANUP", "STOPPED"]
FATAL = ["STARTING", "SERVING", "FATAL", "STOPPED"]
TOKENS = {"token_ids": [1]}


class Engine:
    """Answers every request with one chunk; a test changes what it needs to."""

    def __init__(self, world):
        self.world = world
        self.info = EngineInfo("toy", "/models/toy")
        self.pids = []
        self.aborted = []
        self.hold = None

    async def start(self, worker_id):
        self.world.note("engine started")
        return self.info

    async def generate(self, request, context):
        yield {"token_ids": [1]}
        if self.hold is not None and not context.id().startswith("canary"):
            await self.hold.wait()
        yield {"token_ids": [2], "finish_reason": "stop"}

    async def abort(self, request_id):
        self.aborted.append(request_id)

    def processes(self):
        return self.pids


class EngineWithCanary(Engine):
    def canary_request(self):
        return dict(TOKENS)


class FakeRuntime:
    """Discovery and endpoints as the launcher sees them."""

    status_port = None
    discovery = FakeDiscovery()
    worker_id = 0x4EC5
    problem = None

    def __init__(self, world):
        self.world = world
        self.handlers = {}
        self.closed = asyncio.Event()
        self.serve_error = None
        self.unregister_seconds = 0.0
        self.withdrawn = True
        self.registered = []
        self.exposition = None

    def endpoint(self, name):
        return f"endpoint {name}"

    def record_registration(self, run_dir):
        self.world.note("recorded")
        ledger.record_registration(run_dir, "mem", self.worker_id)

    def serve(self, spec, handler):
        self.world.note(f"served {spec.name}")
        self.handlers[spec.name] = handler

        async def serve():
            await self.closed.wait()
            if self.serve_error:
                raise self.serve_error

        return asyncio.ensure_future(serve())

    def completed(self, info):
        return info

    async def register(self, info, *, endpoint):
        self.world.note("registered")
        self.registered.append(endpoint)

    async def watch_registration(self, on_fatal):
        return None

    async def unregister(self):
        await asyncio.sleep(self.unregister_seconds)
        self.world.note("unregistered")
        return self.withdrawn

    def close_to_others(self, before):
        self.world.note("closed to others")

    def set_ready(self, ready):
        self.world.note("ready" if ready else "not ready")

    def expose_metrics(self, exposition, *, endpoint):
        self.exposition = exposition

    async def shutdown(self, timeout):
        self.world.note("runtime shut down")
        self.closed.set()


class FakePlugins:
    """The hooks; ``hooks`` maps a name to an asynchronous function that replaces doing nothing."""

    engine = "engine 'toy'"

    def __init__(self, world):
        self.world = world
        self.hooks = {}
        self.fatal = []

    def create_engine(self, args, context):
        self.world.context = context
        if isinstance(self.world.engine, BaseException):
            raise self.world.engine
        self.world.note("engine created")
        return self.world.engine

    async def _call(self, hook):
        if hook != "check_health":
            self.world.note(hook)
        if hook in self.hooks:
            await self.hooks[hook]()
        return [HookOutcome(hook, "toy", 0.0)]

    async def on_ready(self, engine, info, timeout):
        return await self._call("on_ready")

    async def check_health(self, engine, timeout):
        return await self._call("check_health")

    async def drain(self, engine, deadline):
        return await self._call("drain")

    async def on_fatal_error(self, engine, error, deadline):
        self.fatal.append(error)
        return await self._call("on_fatal_error")

    async def cleanup(self, engine, deadline, limit):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._call("cleanup"), deadline.within(limit).remaining())


class World:
    """Everything around one launcher, and what happened in it."""

    def __init__(self, tmp_path, monkeypatch):
        self.happened = []
        self.run_dir = tmp_path
        self.monkeypatch = monkeypatch
        self.engine = EngineWithCanary(self)
        self.plugins = FakePlugins(self)
        self.supervised = True
        self.settings = {
            "grace_period": 0,
            "discovery_backend": "mem",
            "health_check_interval": 0.02,
            "stall_timeout": 0,
            "termination_grace_period": 30,
        }
        self.create_error = None
        self.code = None
        self.messages = []

    def note(self, what):
        self.happened.append(what)

    def order(self, *events):
        """Whether these happened, in this order."""
        rest = iter(self.happened)
        return all(event in rest for event in events)

    def run(self, scenario):
        """Let a worker live while ``scenario(world)`` does things to it; return the exit code."""
        asyncio.run(asyncio.wait_for(self._live(scenario), 30))
        return self.code

    async def _live(self, scenario):
        self.runtime = FakeRuntime(self)

        async def create(settings):
            if self.create_error:
                raise self.create_error
            self.runtime.settings = settings
            return self.runtime

        self.monkeypatch.setattr(startup.Runtime, "create", create)
        theirs, ours = pair()
        with ours:
            self.supervisor = Channel(theirs)
            if self.supervised:
                self.monkeypatch.setenv(RUN_DIR, str(self.run_dir))
                ours.setblocking(False)
            control = SupervisorChannel(ours if self.supervised else None)
            self.launcher = Launcher(WorkerSettings(engine="toy", **self.settings), self.plugins, "args", control)
            life = asyncio.ensure_future(self.launcher.run())
            started = time.monotonic()
            try:
                await scenario(self)
                self.code = await life
            finally:
                life.cancel()
                self.took = time.monotonic() - started
                self.read()
                self.supervisor.close()
        await settle()

    def read(self):
        self.messages += self.supervisor.receive()
        return self.messages

    @property
    def states(self):
        """The states that the supervisor was told."""
        return [message["state"] for message in self.read() if message["type"] == "state"]

    @property
    def reason(self):
        return self.launcher.reason

    async def serving(self):
        await until(lambda: self.launcher._state.value == "SERVING")

    def stop(self, level=1, signal_name="SIGTERM"):
        at = time.monotonic()
        self.supervisor.send("stop", level=level, signal=signal_name, at=at)
        return at

    def request(self, request_id="r", endpoint="generate"):
        """Start one request, as the runtime does."""

        async def consume():
            handler = self.runtime.handlers[endpoint]
            return [chunk async for chunk in handler(dict(TOKENS), Context(id=request_id))]

        return asyncio.ensure_future(consume())

    async def busy(self):
        """Start a request that does not end by itself."""
        await self.serving()
        self.engine.hold = asyncio.Event()
        running = self.request()
        await until(lambda: len(self.launcher._requests) == 1)
        return running


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.delenv(RUN_DIR, raising=False)
    return World(tmp_path, monkeypatch)


async def stop_when_serving(world):
    await world.serving()
    world.stop()


# ---------------------------------------------------------------------------------------------------- a graceful life


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


# ------------------------------------------------------------------------------------------------------------- drain


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


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


#: What no ``except Exception`` catches.
NO_EXCEPTIONS = [PanicException, SystemExit, KeyboardInterrupt, asyncio.CancelledError]
#: Where the runtime and the engine can raise during the start.
IN_THE_START = ["create", "create_engine", "start", "processes", "canary_request", "generate", "attach", "register"]


def raising(error, *, later=False):
    """Return a function that raises, when it is called or when it is awaited."""

    def fail(*args, **kwargs):
        raise error

    async def fail_later(*args, **kwargs):
        raise error

    return fail_later if later else fail


@pytest.mark.parametrize("error", NO_EXCEPTIONS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("place", IN_THE_START)
def test_no_exception_hangs_the_start(world, monkeypatch, place, error):
    async def nowhere(endpoint, info):
        pass

    world.engine.attach = nowhere
    if place == "create":
        world.create_error = error()
    elif place == "create_engine":
        world.engine = error()
    elif place == "register":
        monkeypatch.setattr(FakeRuntime, place, raising(error))
    else:
        setattr(world.engine, place, raising(error))
    assert world.run(nothing) == ExitCode.START_FAILED
    assert error.__name__ in world.reason
    assert world.states == ["STARTING", "FATAL", "STOPPED"]
    assert world.took < 3


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


# --------------------------------------------------------------------------------------------------------- discovery


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


# ------------------------------------------------------------------------------------------------------------- start


async def nothing(world):
    pass


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (StartError("no GPU", hint="check nvidia-smi"), ExitCode.START_FAILED, "no GPU"),
        (UsageError("no such model"), ExitCode.USAGE, "no such model"),
        (EngineDeadError("the core is dead"), ExitCode.START_FAILED, "the core is dead"),
        (
            BlockingIOError(errno.EAGAIN, "fork"),
            ExitCode.START_FAILED,
            f"a limit of this machine or container is reached: BlockingIOError: [Errno {errno.EAGAIN}] fork",
        ),
        (AttributeError("HBM"), ExitCode.START_FAILED, "AttributeError: HBM"),
        (SystemExit(5), ExitCode.START_FAILED, "SystemExit: 5"),
        (asyncio.CancelledError("inside"), ExitCode.START_FAILED, "CancelledError: inside"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_start_that_fails(world, error, code, reason):
    async def fail(worker_id):
        raise error

    world.engine.start = fail
    assert world.run(nothing) == code
    assert world.states == ["STARTING", "FATAL", "STOPPED"]
    assert world.reason == reason
    assert world.order("on_fatal_error", "runtime shut down", "cleanup"), "what had started is cleaned up"
    (fatal,) = world.plugins.fatal
    assert error in (fatal, fatal.__cause__)
    assert "served generate" not in world.happened


def test_a_start_without_a_thread_to_spare(world, monkeypatch):
    monkeypatch.setattr(threads, "can_start_thread", lambda: False)
    assert world.run(nothing) == ExitCode.START_FAILED
    assert "no thread can be started" in world.reason
    assert "served generate" not in world.happened


def test_the_supervisor_is_told_why(world):
    async def fail(worker_id):
        raise StartError("no GPU")

    world.engine.start = fail
    world.run(nothing)
    (message,) = [message for message in world.messages if message.get("state") == "FATAL"]
    assert message["reason"] == "no GPU"
    assert message["deadline"] > time.monotonic() - 30


def test_a_runtime_that_does_not_start(world):
    world.create_error = StartError("etcd cannot be reached")
    assert world.run(nothing) == ExitCode.START_FAILED
    assert world.happened == ["on_fatal_error"], "there is nothing to clean up"


def test_an_engine_that_cannot_be_created(world):
    world.engine = StartError("vllm is not installed")
    assert world.run(nothing) == ExitCode.START_FAILED
    assert world.happened == ["not ready", "unregistered", "on_fatal_error", "runtime shut down"]


def test_a_warm_up_that_takes_too_long(world):
    world.settings["warmup_timeout"] = 0.05

    async def hang(request, context):
        await asyncio.sleep(60)
        yield {}

    world.engine.generate = hang
    assert world.run(nothing) == ExitCode.START_FAILED
    assert "first request within 0.05 s" in world.reason
    assert world.engine.aborted, "the engine forgets the request"


def test_the_warm_up_comes_before_the_model_is_registered(world):
    async def generate(request, context):
        world.note("warm-up")
        yield {"token_ids": [1], "finish_reason": "stop"}

    world.engine.generate = generate
    world.run(stop_when_serving)
    assert world.order("engine started", "warm-up", "recorded", "registered")


def test_plugins_hear_of_a_worker_that_is_ready(world):
    async def scenario(world):
        await until(lambda: "on_ready" in world.happened)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.order("engine started", "registered", "ready", "on_ready")
    assert world.happened.count("on_ready") == 1


def test_a_plugin_that_never_is_done_with_being_ready_holds_nothing_up(world):
    world.plugins.hooks["on_ready"] = lambda: asyncio.sleep(60)

    async def scenario(world):
        await until(lambda: "on_ready" in world.happened)
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED


def test_the_warm_up_can_be_left_out(world):
    world.settings["warmup"] = False
    world.engine.generate = lambda request, context: pytest.fail("asked")
    assert world.run(stop_when_serving) == ExitCode.STOPPED


def test_an_engine_without_a_canary_serves_all_the_same(world, caplog):
    world.engine = Engine(world)
    world.settings["stall_timeout"] = 30
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert "no canary request" in caplog.text


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


# ------------------------------------------------------------------------------------------------------------- fatal


@contextlib.contextmanager
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


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


# --------------------------------------------------------------------------------------------------------- by force


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


# ----------------------------------------------------------------------------------------------- without a supervisor


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


async def stop_itself(world):
    await world.serving()
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------- what an engine may offer


BROKEN = {
    "generate is a coroutine": "generate is a coroutine function",
    "start returns None": "start: expected an EngineInfo, got None",
    "processes returns an int": "processes: expected pids, got 7",
    "no token_ids": "its first answer has a chunk without a list of token_ids",
    "a float": "has the token 1.5",
    "beyond the vocabulary": "has the token 100, which is not in its vocabulary of 100 tokens",
    "unknown finish reason": "has the finish_reason 'done'",
    "no finish reason": "ended without a finish_reason",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_engine_does_not_serve(world, fault):
    async def nothing_(*args):
        return None

    answers = {
        "no token_ids": [{"index": 0, "finish_reason": "stop"}],
        "a float": [{"token_ids": [1.5], "finish_reason": "stop"}],
        "beyond the vocabulary": [{"token_ids": [100], "finish_reason": "stop"}],
        "unknown finish reason": [{"token_ids": [1], "finish_reason": "done"}],
        "no finish reason": [{"token_ids": [1]}],
    }

    async def generate(request, context):
        for chunk in answers[fault]:
            yield chunk

    world.engine.info = EngineInfo("toy", "/models/toy", vocab_size=100)
    if fault in answers:
        world.engine.generate = generate
    elif fault == "generate is a coroutine":
        world.engine.generate = nothing_
    elif fault == "start returns None":
        world.engine.start = nothing_
    else:
        world.engine.processes = lambda: 7
    assert world.run(nothing) == ExitCode.START_FAILED
    assert world.reason.startswith("engine 'toy': ")
    assert BROKEN[fault] in world.reason
    assert world.runtime.registered == []


def test_prompts_beyond_the_vocabulary_are_refused(world):
    world.engine.info = EngineInfo("toy", "/models/toy", vocab_size=100)

    async def scenario(world):
        await world.serving()
        handler = world.runtime.handlers["generate"]
        with pytest.raises(InvalidArgument, match="vocabulary of 100 tokens"):
            await handler({"token_ids": [100]}, Context(id="r")).__anext__()
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED


async def ask(caplog, request):
    """Send a request to the status server and return the answer."""
    (record,) = [record for record in caplog.records if record.getMessage() == "Status server listening"]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(record.fields["url"].rpartition(":")[2]))
    writer.write(request.encode())
    answer = await reader.read()
    writer.close()
    return answer


def test_everything_an_engine_offers_is_wired(world, caplog):
    async def sleep(body):
        return body

    class Rich(EngineWithCanary):
        async def attach(self, endpoint, info):
            self.world.note(f"attached to {endpoint} for {info.model_name}")

        def metrics_registry(self):
            registry = CollectorRegistry()
            Gauge("toy_kv_usage", "Usage", registry=registry).set(0.5)
            return registry

        def control_routes(self):
            return {"sleep": sleep}

    world.engine = Rich(world)
    world.engine.info = EngineInfo("toy", "/m", endpoints=[EndpointSpec("clear"), EndpointSpec("lora")])
    world.settings |= {"system_port": 0, "system_host": "127.0.0.1"}
    caplog.set_level("INFO")

    async def scenario(world):
        await world.serving()
        head = "POST /engine/sleep HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        answer = await ask(caplog, head + 'content-length: 8\r\n\r\n{"a": 1}')
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b'{"a": 1}')
        assert "toy_kv_usage 0.5" in world.runtime.exposition()
        world.stop()

    assert world.run(scenario) == ExitCode.STOPPED
    assert world.order("attached to endpoint generate for toy", "recorded", "served generate", "registered", "ready")
    assert sorted(world.runtime.handlers) == ["clear", "generate", "lora"]
    assert world.runtime.registered == ["generate"]


def test_a_headless_rank_serves_only_what_it_offers(world):
    world.engine.info = EngineInfo("toy", None, endpoints=[EndpointSpec("clear")])
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert list(world.runtime.handlers) == ["clear"]
    assert "registered" not in world.happened


# ---------------------------------------------------------------------------------------- status server and frontend


def test_the_status_server_answers_from_the_first_moment_to_the_last(world, caplog):
    caplog.set_level("INFO")
    world.settings |= {"system_port": 0, "system_host": "127.0.0.1"}
    answers = {}

    async def probe(when):
        for path in ("/live", "/health"):
            answers[when, path] = int((await ask(caplog, f"GET {path} HTTP/1.1\r\n\r\n")).split()[1])

    async def start(worker_id):
        await probe("starting")
        return world.engine.info

    world.engine.start = start
    world.plugins.hooks["drain"] = lambda: probe("draining")
    world.plugins.hooks["cleanup"] = lambda: probe("cleaning up")
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert answers == {
        (when, path): 200 if path == "/live" else 503
        for when in ("starting", "draining", "cleaning up")
        for path in ("/live", "/health")
    }


def test_a_control_token_that_cannot_be_read_opens_nothing(world, tmp_path):
    world.settings |= {"system_port": 0, "system_host": "127.0.0.1", "control_token_file": tmp_path / "none"}
    assert world.run(nothing) == ExitCode.USAGE
    assert "--control-token-file" in world.reason
    assert "engine created" not in world.happened


def test_the_engine_learns_what_its_operations_may_touch(world, monkeypatch):
    contexts = []
    create = world.plugins.create_engine

    def remember(args, context):
        contexts.append(context)
        return create(args, context)

    monkeypatch.setattr(world.plugins, "create_engine", remember)
    world.settings |= {"control_load_root": ("/adapters",), "control_write_root": ("/profiles",)}
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert contexts[0].allowed_paths == AllowedPaths(("/adapters",), ("/profiles",))


def test_a_status_port_in_use_is_a_failed_start(world):
    with socket.create_server(("127.0.0.1", 0)) as other:
        world.settings |= {"system_port": other.getsockname()[1], "system_host": "127.0.0.1"}
        assert world.run(nothing) == ExitCode.START_FAILED
    assert "is in use" in world.reason
    assert "engine created" not in world.happened


HOSTS = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST")


class FakeFrontend:
    """Stands in for the process of ``--frontend``."""

    url = "http://127.0.0.1:8000"

    def __init__(self, world, process):
        self.world = world
        self.pid = process.pid
        self.hangs = False
        self.failure = None

    async def wait_ready(self, model):
        self.world.note(f"frontend offers {model}")

    async def check(self):
        if self.hangs:
            await asyncio.Event().wait()

    def drain(self):
        self.world.note("frontend drains")

    def kill(self):
        self.world.note("frontend killed")

    async def stop(self, deadline):
        self.world.note(f"frontend has {deadline.remaining():.0f} s")


@pytest.fixture
def frontend(world, monkeypatch):
    with child() as process:

        def start(settings, discovery_path, run_dir):
            world.note("frontend started")
            world.hosts = [os.environ[name] for name in HOSTS]
            world.discovery_path = discovery_path
            assert run_dir == world.run_dir or not world.supervised
            world.frontend = FakeFrontend(world, process)
            return world.frontend

        monkeypatch.setattr(startup.FrontendProcess, "start", start)
        for name in HOSTS:
            monkeypatch.setenv(name, "")  # which is as good as none
        world.settings |= {"frontend": "127.0.0.1:8000", "discovery_backend": "file"}
        yield process


def test_a_frontend_outlives_a_supervised_worker(world, frontend):
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert world.order("frontend started", "engine created", "registered", "frontend offers toy", "ready")
    assert world.order("frontend drains", "drain", "cleanup")
    assert not [note for note in world.happened if note.startswith("frontend has")], "who cleans up behind it waits"


@pytest.mark.parametrize(("drain", "seconds"), [("handoff", range(20, 30)), ("abort", range(2))])
def test_without_a_supervisor_the_worker_waits_for_its_frontend(world, frontend, drain, seconds):
    world.supervised = False
    world.settings["drain"] = drain

    async def scenario(world):
        await world.serving()
        world.launcher._stop._on_signal(signal.SIGTERM)

    world.run(scenario)
    (note,) = [note for note in world.happened if note.startswith("frontend has")]
    assert int(note.split()[2]) in seconds


def test_a_frontend_that_hangs_ends_the_worker_and_is_given_no_time(world, frontend):
    world.settings |= {"health_check_interval": 0.01, "health_check_timeout": 0.3}

    async def scenario(world):
        await world.serving()
        world.frontend.hangs = True

    assert world.run(scenario) == ExitCode.FATAL
    assert world.reason == "the frontend has not answered for 0.3 s"
    assert "frontend killed" in world.happened


@pytest.mark.parametrize(
    ("change", "offered"),
    [
        ({}, "model"),
        ({"worker_type": "prefill", "endpoint_types": ("prefill",)}, None),
        ({"worker_type": "decode", "needs": [["prefill"]]}, None),
        ({"endpoint_types": ("embedding",)}, None),
    ],
)
def test_a_frontend_is_asked_only_for_what_it_lists_with_this_worker_alone(change, offered):
    info = EngineInfo(model_name="model", model_path="/model")
    assert embedded_frontend.listed_model(replace(info, **change)) == offered


def test_frontend_and_worker_meet_in_the_private_directory(world, frontend):
    world.run(stop_when_serving)
    assert world.discovery_path == world.run_dir / "discovery"
    assert world.discovery_path.is_dir()
    assert world.runtime.settings.discovery_path == world.discovery_path


def test_frontend_and_worker_meet_where_the_path_led_at_the_start(world, frontend, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    world.settings["discovery_path"] = tmp_path / "link" / "kv"
    world.run(stop_when_serving)
    assert world.discovery_path == world.runtime.settings.discovery_path == tmp_path / "real" / "kv"


def test_a_directory_that_was_asked_for_is_used(world, frontend, tmp_path):
    world.settings["discovery_path"] = tmp_path / "a" / "kv"
    world.run(stop_when_serving)
    assert world.discovery_path == world.runtime.settings.discovery_path == tmp_path / "a" / "kv"


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("127.0.0.1:8000", ["127.0.0.1", "192.0.2.7", "127.0.0.1"]),
        ("[::1]:8000", ["127.0.0.1", "192.0.2.7", "127.0.0.1"]),
        ("192.0.2.1:8000", ["", "192.0.2.7", ""]),
    ],
)
def test_with_a_frontend_on_loopback_all_is_there_unless_the_operator_says(
    world, frontend, monkeypatch, address, hosts
):
    monkeypatch.setenv(HOSTS[1], "192.0.2.7")
    world.settings["frontend"] = address
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert world.hosts == hosts
    assert world.order("registered", "closed to others", "ready")


@pytest.mark.parametrize(("host", "said"), [("", True), ("127.0.0.1", True), ("192.0.2.1", False)])
def test_a_cluster_is_told_that_only_this_machine_reaches_the_worker(world, frontend, monkeypatch, caplog, host, said):
    monkeypatch.setenv(HOSTS[0], host)
    world.settings["discovery_backend"] = "etcd"
    assert world.run(stop_when_serving) == ExitCode.STOPPED
    assert ("only those on this machine can reach it" in caplog.text) == said


@pytest.mark.parametrize(("router", "wanted"), [("round-robin", False), ("least-loaded", True), ("kv", True)])
def test_an_engine_hears_whether_a_router_reads_its_events(world, frontend, monkeypatch, router, wanted):
    create, contexts = world.plugins.create_engine, []

    def remember(args, context):
        contexts.append(context)
        return create(args, context)

    monkeypatch.setattr(world.plugins, "create_engine", remember)
    world.settings["router_mode"] = router
    world.run(stop_when_serving)
    assert contexts[0].events_wanted is wanted


def test_a_frontend_that_dies_ends_the_worker(world, frontend):
    async def scenario(world):
        await world.serving()
        frontend.kill()

    assert world.run(scenario) == ExitCode.FATAL
    assert f"frontend process {frontend.pid}" in world.reason


def test_a_frontend_that_fails_while_it_drains_is_a_failure(world, frontend, caplog):
    async def scenario(world):
        await stop_when_serving(world)
        world.frontend.failure = "killed by signal 9"

    assert world.run(scenario) == ExitCode.FATAL
    assert world.reason == "the frontend ended before its streams did: killed by signal 9"
    assert "The frontend ended before its streams did" in caplog.text


@pytest.fixture
def short_tmpdir(monkeypatch):
    """A TMPDIR with a path that is not too long for unix sockets, as pytest's own are."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setenv("TMPDIR", path)
        yield Path(path)


def test_no_private_directory_is_left_in_the_temporary_directory(world, short_tmpdir):
    world.supervised = False
    world.create_error = StartError("no etcd")
    assert world.run(nothing) == ExitCode.START_FAILED
    assert list(short_tmpdir.iterdir()) == []


def test_a_directory_put_in_the_place_of_the_private_one_is_not_emptied(world, short_tmpdir, caplog):
    """Without a supervisor the worker removes it, through its descriptor."""
    world.supervised = False

    async def scenario(world):
        await world.serving()
        private = world.context.private_dir
        assert private.parent == short_tmpdir
        (private / "of-the-engine").touch()
        private.rename(short_tmpdir / "moved")
        private.mkdir()
        (private / "precious").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    assert world.run(scenario) == ExitCode.STOPPED
    assert (world.context.private_dir / "precious").exists()
    assert list((short_tmpdir / "moved").iterdir()) == []
    assert "Run directory not removed" in caplog.text


def test_a_temporary_directory_that_others_may_write_is_made_safe(world, short_tmpdir, caplog):
    """Such as the volume `emptyDir` of Kubernetes."""
    world.supervised = False
    short_tmpdir.chmod(0o777)
    world.create_error = StartError("no etcd")
    world.run(nothing)
    assert short_tmpdir.stat().st_mode & 0o7777 == 0o1777
    assert "TMPDIR cannot be used as it is" in caplog.text


def test_no_place_for_the_private_directory(world, monkeypatch):
    def create():
        raise OSError(errno.ENOSPC, "/tmp: No space left on device (make room, or set TMPDIR)")

    world.supervised = False
    monkeypatch.setattr(startup.RunDirectory, "create", create)
    assert world.run(nothing) == ExitCode.START_FAILED
    assert "private directory" in world.reason
    assert "No space left on device" in world.reason


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
