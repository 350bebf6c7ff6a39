"""The frontend beside a worker: where both meet, and who outlives whom."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest
from worker_world import child, stop_when_serving

from dynamo_worker.engine import EngineInfo
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host import startup
from dynamo_worker.host.frontend import embedded_frontend

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
        ({"endpoint_types": ("embedding",)}, "model"),
        ({"endpoint_types": ("images",)}, None),
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
