"""A drain on request: out of service and back, whatever else happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time

import pytest
from aio import until
from dynamo.llm.exceptions import Cancelled, EngineShutdown, WorkerUnavailable
from worker_world import GRACEFUL

from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import EngineDeadError, InvalidRequestError, WorkerError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host import requested_drain
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.drain_phase import DRAIN, DRAIN_STATUS, RESUME
from dynamo_worker.host.status.drain_routes import drain_routes, request


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(requested_drain, "_RETRY", 0.02)
    monkeypatch.setattr(requested_drain, "_ENTER", 0.3)


@pytest.fixture
def world(world):
    """Return a world with a status server, whose control routes :func:`call` calls."""
    world.settings |= {"system_port": 0, "system_host": "127.0.0.1"}
    return world


async def call(world, route, body=None):
    """Call a control route as the status server does, without the network."""
    return json.loads(json.dumps(await world.routes[route]({} if body is None else body)))


def lives(world, scenario):
    """Let a serving worker live while the scenario runs, and stop it if the scenario has not; return the exit code."""

    async def live(world):
        await world.serving()
        world.drain = world.launcher._parts.requested_drain
        world.routes = drain_routes(world.drain, world.launcher._settings)
        await scenario(world)
        world.stop()

    return world.run(live)


async def phase(world, name):
    await until(lambda: world.drain.phase.value == name)


NOW = {"grace_period": 0}


def test_requests_in_flight_finish_and_the_worker_comes_back(world):
    async def scenario(world):
        running = await world.busy()
        started = await call(world, DRAIN, NOW | {"budget": 20})
        assert started["status"] == "success"
        assert (started["phase"], started["in_flight"], started["mode"]) == ("leaving", 1, "complete")
        assert 19 < started["left_s"] <= 20
        await phase(world, "draining")
        with pytest.raises(WorkerUnavailable, match="drained on request"):
            await world.request("late")
        assert world.drain.problem == "draining on request: 1 in flight"
        world.engine.hold.set()
        assert [chunk["token_ids"] for chunk in await running] == [[1], [2]]
        await phase(world, "drained")
        assert world.drain.problem == "drained on request"
        report = await call(world, DRAIN_STATUS)
        assert (report["phase"], report["in_flight"], report["in_discovery"]) == ("drained", 0, False)
        assert world.launcher._state.value == "SERVING", "the engine stays"

        resumed = await call(world, RESUME)
        assert (resumed["status"], resumed["phase"], resumed["in_discovery"]) == ("success", "serving", True)
        assert "mode" not in resumed
        assert world.drain.problem is None
        assert len(await world.request("again")) == 2

    assert lives(world, scenario) == ExitCode.STOPPED
    assert world.runtime.discovery.calls == ["leave", "enter"]
    assert world.order("ready", "not ready", "drain", "ready", "not ready", "unregistered")
    assert world.states[:3] == ["STARTING", "SERVING", "SERVING"]


def test_every_phase_is_shown(world):
    seen = []

    async def scenario(world):
        set_phase = world.launcher._metrics.set_drain_phase
        world.launcher._metrics.set_drain_phase = lambda phase: (seen.append(phase.value), set_phase(phase))
        await call(world, DRAIN, {"grace_period": 0.01})
        await phase(world, "drained")
        assert 'dynamo_worker_drain_phase{phase="drained"} 1.0' in world.runtime.exposition()
        await call(world, RESUME)
        assert 'dynamo_worker_drain_phase{phase="drained"} 0.0' in world.runtime.exposition()

    lives(world, scenario)
    assert seen == ["leaving", "grace", "draining", "drained", "resuming", "serving"]
    told = [message["drain"] for message in world.messages if message.get("state") == "SERVING"]
    assert told == ["serving", *seen], "the supervisor is told"


def test_the_probes_follow(world):
    async def scenario(world):
        server = world.launcher._parts.status
        port = server._server.sockets[0].getsockname()[1]
        await call(world, DRAIN, NOW)
        await phase(world, "drained")
        for path, status in (("/live", b"200"), ("/health", b"503")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            assert answer.split()[1] == status
            assert b'"reason": "drained on request"' in answer

    lives(world, scenario)


def test_during_the_grace_period_requests_are_still_served(world):
    async def scenario(world):
        await call(world, DRAIN, {"grace_period": 0.3})
        await phase(world, "grace")
        assert len(await world.request("late")) == 2
        since = time.monotonic()
        await phase(world, "drained")
        assert time.monotonic() - since < 2

    lives(world, scenario)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({"mode": "handoff"}, EngineShutdown, "handed off: the worker is drained on request"),
        ({"mode": "abort"}, Cancelled, "aborted: the worker is drained on request"),
        ({"mode": "complete", "budget": 0.2}, EngineShutdown, "handed off: the worker is drained on request"),
        ({"mode": "complete", "budget": 0}, EngineShutdown, "handed off: the worker is drained on request"),
        ({"mode": "abort", "budget": 0}, Cancelled, "aborted: the worker is drained on request"),
    ],
)
def test_what_does_not_finish_is_ended(world, body, error, message):
    async def scenario(world):
        running = await world.busy()
        await call(world, DRAIN, NOW | body)
        with pytest.raises(error, match=message):
            await running
        await phase(world, "drained")
        assert world.engine.aborted == ["r"]

    assert lives(world, scenario) == ExitCode.STOPPED


def test_an_endpoint_that_does_not_wait_is_handed_off_first(world):
    async def generate(request, context):
        yield {"token_ids": [1]}
        await asyncio.sleep(60)

    world.engine.info = EngineInfo(
        "toy", "/models/toy", endpoints=[EndpointSpec("hasty", generate=generate, graceful_shutdown=False)]
    )

    async def scenario(world):
        hasty = world.request("h", "hasty")
        await until(lambda: len(world.launcher._requests) == 1)
        await call(world, DRAIN, NOW)
        with pytest.raises(EngineShutdown):
            await hasty
        await phase(world, "drained")

    lives(world, scenario)


def test_a_request_that_does_not_end_keeps_the_worker_from_being_drained(world):
    async def stubborn(request, context):
        yield {"token_ids": [1]}
        while not (context.id().startswith("canary") or world.end.is_set()):
            world.stuck.set()
            with contextlib.suppress(asyncio.CancelledError):
                await world.end.wait()
        yield {"token_ids": [2], "finish_reason": "stop"}

    async def scenario(world):
        world.stuck, world.end = asyncio.Event(), asyncio.Event()
        running = world.request()
        await world.stuck.wait()
        await call(world, DRAIN, NOW | {"mode": "handoff", "budget": 0})
        await asyncio.sleep(1.2)
        report = await call(world, DRAIN_STATUS)
        assert (report["phase"], report["in_flight"], report["left_s"]) == ("draining", 1, 0)
        world.end.set()
        await asyncio.wait({running})
        await phase(world, "drained")

    world.engine.generate = stubborn
    lives(world, scenario)


# ------------------------------------------------------------------------------------------------------------- races


def test_a_second_drain_never_slows_the_first_one_down(world):
    async def scenario(world):
        await world.busy()
        first = await call(world, DRAIN, NOW | {"budget": 20})
        again = await call(world, DRAIN, {"budget": 600, "grace_period": 60, "mode": "complete"})
        assert again["left_s"] <= first["left_s"]
        await phase(world, "draining")
        hooks = world.happened.count("drain")
        await call(world, DRAIN, {})
        await asyncio.sleep(0.02)
        assert world.happened.count("drain") == hooks == 1, "nothing began again"
        world.engine.hold.set()

    lives(world, scenario)


@pytest.mark.parametrize("at", ["grace", "draining"])
def test_a_second_drain_hurries_the_first_one(world, at):
    async def scenario(world):
        running = await world.busy()
        await call(world, DRAIN, {"grace_period": 0 if at == "draining" else 60, "budget": 100})
        await phase(world, at)
        report = await call(world, DRAIN, {"mode": "handoff"})
        assert report["mode"] == "handoff"
        with pytest.raises(EngineShutdown):
            await running
        await phase(world, "drained")
        again = await call(world, DRAIN, {"mode": "abort"})
        assert (again["phase"], again["mode"]) == ("drained", "handoff"), "there is nothing left to hurry"

    lives(world, scenario)
    assert world.runtime.discovery.calls == ["leave"]


@pytest.mark.parametrize("at", ["leaving", "grace", "draining"])
def test_a_resume_stops_a_drain(world, at):
    async def scenario(world):
        if at == "leaving":
            left = asyncio.Event()
            world.runtime.discovery.leave = left.wait
        running = await world.busy()
        await call(world, DRAIN, {"grace_period": 60 if at == "grace" else 0, "budget": 100})
        await phase(world, at)
        assert (await call(world, RESUME))["phase"] == "serving"
        assert not running.done()
        world.engine.hold.set()
        assert len(await running) == 2
        assert len(await world.request("new")) == 2
        await asyncio.sleep(0.05)
        assert world.drain.phase.value == "serving", "nothing of the drain is left"

    assert lives(world, scenario) == ExitCode.STOPPED


def test_resumes_and_drains_at_once(world):
    async def scenario(world):
        assert (await call(world, RESUME))["phase"] == "serving", "nothing to do"
        await call(world, DRAIN, NOW)
        await phase(world, "drained")
        answers = await asyncio.gather(*(call(world, RESUME) for _ in range(3)))
        assert [answer["phase"] for answer in answers] == ["serving"] * 3
        assert world.runtime.discovery.calls == ["leave", "enter"], "one of them did it"
        await asyncio.gather(call(world, DRAIN, NOW), call(world, RESUME), call(world, DRAIN, NOW))
        await phase(world, "drained")
        assert world.runtime.discovery.calls == ["leave", "enter", "enter", "leave"]
        await call(world, RESUME)

    assert lives(world, scenario) == ExitCode.STOPPED


@pytest.mark.parametrize("at", ["leaving", "grace", "draining", "drained", "resuming"])
def test_a_shutdown_takes_over(world, at):
    world.settings |= {"grace_period": 30, "termination_grace_period": 60}

    async def scenario(world):
        never = asyncio.Event()
        if at == "leaving":
            world.runtime.discovery.leave = never.wait
        if at == "resuming":
            world.runtime.discovery.enter = never.wait
        running = await world.busy()
        await call(world, DRAIN, {"grace_period": 60 if at == "grace" else 0, "budget": 600})
        if at in ("drained", "resuming"):
            world.engine.hold.set()
            await phase(world, "drained")
        resume = asyncio.ensure_future(call(world, RESUME)) if at == "resuming" else None
        await phase(world, at)
        world.stop()
        await until(lambda: world.launcher._state.value != "SERVING")
        for route in (DRAIN, RESUME, DRAIN_STATUS):
            answer = await call(world, route)
            assert (answer["status"], answer["message"]) == ("error", "the worker is shutting down")
        if resume is not None:
            assert (await resume)["message"] == "the worker is shutting down"
        if at in ("leaving", "grace", "resuming"):  # requests may still come
            assert world.launcher._state.value in ("UNREGISTERING", "GRACE")
            world.stop(2)
        else:
            await asyncio.sleep(0.05)
            world.engine.hold.set()
        await asyncio.wait({running})

    code = lives(world, scenario)
    forced = at in ("leaving", "grace", "resuming")
    assert code == (128 + signal.SIGTERM if forced else ExitCode.STOPPED)
    assert world.order("not ready", "unregistered", "cleanup")
    assert world.took < 10, "a worker that refuses requests already waits for no router"
    if not forced:
        assert [state for index, state in enumerate(world.states) if state not in world.states[:index]] == GRACEFUL


def test_the_grace_period_of_a_shutdown_counts_from_leaving_discovery(world):
    world.settings |= {"grace_period": 0.5}

    async def scenario(world):
        await call(world, DRAIN, {"grace_period": 60, "budget": 100})
        await phase(world, "grace")
        await asyncio.sleep(0.5)
        world.since = world.stop()

    assert lives(world, scenario) == ExitCode.STOPPED
    assert time.monotonic() - world.since < 0.45


def test_an_engine_that_dies_while_drained_ends_the_worker(world):
    async def scenario(world):
        await call(world, DRAIN, NOW)
        await phase(world, "drained")

        async def dead():
            raise EngineDeadError("the core is dead")

        world.plugins.hooks["check_health"] = dead
        await until(lambda: world.launcher._state.value != "SERVING")
        assert (await call(world, RESUME))["message"] == "the worker is shutting down"

    assert lives(world, scenario) == ExitCode.FATAL
    assert world.reason == "the core is dead"


# --------------------------------------------------------------------------------------------------------- discovery


def test_a_discovery_that_fails_does_not_stop_the_drain(world, caplog):
    async def scenario(world):
        world.runtime.discovery.refuses = True
        running = await world.busy()
        await call(world, DRAIN, NOW)
        await phase(world, "draining")
        with pytest.raises(WorkerUnavailable):
            await world.request("late")
        world.engine.hold.set()
        await running
        await phase(world, "drained")
        assert (await call(world, DRAIN_STATUS))["in_discovery"] is True
        world.runtime.discovery.refuses = False
        await until(lambda: not world.runtime.discovery.present)
        assert (await call(world, DRAIN_STATUS))["in_discovery"] is False

    assert lives(world, scenario) == ExitCode.STOPPED
    assert "Cannot leave discovery; trying again" in caplog.text


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_discovery_that_does_not_take_the_worker_back(world, how):
    async def scenario(world):
        discovery = world.runtime.discovery
        await call(world, DRAIN, NOW)
        await phase(world, "drained")
        enter = discovery.enter
        if how == "hangs":
            discovery.enter = asyncio.Event().wait
        else:
            discovery.refuses = True
        answer = await call(world, RESUME)
        assert answer["status"] == "error"
        assert "the worker stays drained: discovery does not take it back" in answer["message"]
        assert ("has not answered" if how == "hangs" else "discovery is gone") in answer["message"]
        await phase(world, "drained")
        with pytest.raises(WorkerUnavailable):
            await world.request("late")
        discovery.refuses, discovery.enter = False, enter
        assert (await call(world, RESUME))["phase"] == "serving"
        assert len(await world.request("again")) == 2

    assert lives(world, scenario) == ExitCode.STOPPED


def test_a_paused_engine_is_named(world):
    async def scenario(world):
        world.runtime.discovery.engine_out = True
        await call(world, DRAIN, NOW)
        await phase(world, "drained")
        assert (await call(world, RESUME))["engine_paused"] is True

    lives(world, scenario)


# ------------------------------------------------------------------------------------------------------------- bodies


def test_before_the_worker_serves_it_cannot_be_drained(world):
    async def scenario(world):
        world.launcher._parts.requested_drain._state = lambda: requested_drain.State.STARTING
        for route in (DRAIN, RESUME, DRAIN_STATUS):
            assert (await call(world, route))["message"] == "the worker is starting"
        with pytest.raises(WorkerError):
            world.drain.require_service()

    lives(world, scenario)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "expected a JSON object as the body, got a list of length 0"),
        ({"mode": "now"}, "mode: expected one of complete, handoff, abort, got 'now'"),
        ({"mode": None}, "mode: expected one of complete, handoff, abort, got None"),
        ({"mode": ["complete"]}, "mode: expected one of complete, handoff, abort, got a list of length 1"),
        ({"budget": -1}, "budget: expected a number of seconds between 0 and 604800, got -1"),
        ({"budget": "soon"}, "budget: expected a number of seconds between 0 and 604800, got 'soon'"),
        ({"budget": float("nan")}, "budget: expected a number of seconds between 0 and 604800, got nan"),
        ({"grace_period": True}, "grace_period: expected a number of seconds between 0 and 604800, got a boolean"),
        ({"budgt": 1}, "unknown field 'budgt', did you mean budget?; expected mode, budget, grace_period"),
    ],
)
def test_bodies_that_are_refused(body, message):
    with pytest.raises(InvalidRequestError) as refused:
        request(body, WorkerSettings(engine="toy"))
    assert str(refused.value).startswith(message)


def test_a_refused_body_changes_nothing(world):
    async def scenario(world):
        for route in (DRAIN, RESUME, DRAIN_STATUS):
            answer = await call(world, route, {"x": 1})
            assert (answer["status"], answer["phase"]) == ("error", "serving")
        assert "expected an empty object" in (await call(world, RESUME, {"mode": "abort"}))["message"]

    lives(world, scenario)
    assert world.runtime.discovery.calls == []


@pytest.mark.parametrize(
    ("settings", "body", "grace"),
    [
        ({}, {}, 5),
        ({}, {"mode": "handoff"}, 0),
        ({}, {"grace_period": 2}, 2),
        ({"drain": "handoff"}, {}, 0),
        ({"drain": "handoff"}, {"mode": "complete"}, 5),
        ({"grace_period": 3}, {}, 3),
        ({"grace_period": 3}, {"mode": "abort"}, 3),
        ({"grace_period": 3}, None, 3),
    ],
)
def test_what_is_left_out_is_as_in_a_shutdown(settings, body, grace):
    made = request(body, WorkerSettings(engine="toy", termination_grace_period=60, **settings))
    assert made.grace == grace
    assert made.mode.value == ((body or {}).get("mode") or settings.get("drain", "complete"))
    assert 52 < made.deadline.remaining() <= 53, "60 s without the reserves of the clean-up and the supervisor"
