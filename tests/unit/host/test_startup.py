"""A start builds everything in order; whatever fails ends it with a reason and exit code 3."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest
from aio import until
from dynamo.llm.exceptions import InvalidArgument
from dynamo.runtime import Context
from prometheus_client import CollectorRegistry, Gauge
from worker_world import (
    NO_EXCEPTIONS,
    Engine,
    EngineWithCanary,
    FakeRuntime,
    ask,
    nothing,
    raising,
    stop_when_serving,
)

from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import EngineDeadError, StartError, UsageError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host import startup
from dynamo_worker.host.monitors import threads

#: Where the runtime and the engine can raise during the start.
IN_THE_START = ["create", "create_engine", "start", "processes", "canary_request", "generate", "attach", "register"]


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
        (usage,) = [line for line in world.runtime.exposition().splitlines() if line.startswith("toy_kv_usage{")]
        assert usage.endswith(" 0.5")
        for label in ('dynamo_namespace="dynamo"', 'dynamo_component="backend"', 'dynamo_endpoint="generate"'):
            assert label in usage
        for label in ('worker_id="4ec5"', 'model="toy"', 'model_name="toy"'):
            assert label in usage
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
