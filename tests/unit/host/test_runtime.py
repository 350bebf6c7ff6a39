"""What surrounds the Dynamo runtime: servers it needs, directories, names, ports, and how it is ended."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import pytest
from aio import settle, until

from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import StartError
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.discovery import model_card
from dynamo_worker.host.discovery import registration as registration_module
from dynamo_worker.host.discovery import runtime as runtime_module
from dynamo_worker.host.discovery.runtime import Runtime
from dynamo_worker.host.listening import listening_ports
from dynamo_worker.supervisor import ledger

pytestmark = pytest.mark.usefixtures("environment")


def worker_settings(**values):
    return WorkerSettings(engine="echo", **values)


class FakeEndpoint:
    def __init__(self, path):
        self.path = path
        self.served = []
        self.left = 0
        self.closed = asyncio.Event()
        self.error = None
        self.metrics = self

    def connection_id(self):
        return 0x4EC5C2A6E8130C29

    async def serve_endpoint(self, handler, graceful_shutdown, metrics_labels):
        self.served.append((handler, graceful_shutdown, metrics_labels))
        await self.closed.wait()

    async def unregister_endpoint_instance(self):
        self.left += 1
        if self.error:
            raise self.error

    def register_prometheus_expfmt_callback(self, callback):
        self.exposition = callback


class FakeDistributedRuntime:
    """The part of the runtime that is called, with a memory."""

    def __init__(self):
        self.endpoints = {}
        self.health = []
        self.shut_down = False

    def endpoint(self, path):
        assert path not in self.endpoints, "one object for each endpoint"
        self.endpoints[path] = FakeEndpoint(path)
        return self.endpoints[path]

    def set_health_status(self, ready):
        self.health.append(ready)

    def shutdown(self):
        self.shut_down = True


def make(**values):
    fake = FakeDistributedRuntime()
    return fake, Runtime(fake, worker_settings(**values), None)


# ------------------------------------------------------------------------------------------------------------- ports


def test_listening_ports_are_found_and_nothing_else():
    before = listening_ports()
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as server6,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket() as bound,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        bound.bind(("127.0.0.1", 0))  # bound, but it does not listen
        unix.bind("\0dynamo-worker-test")
        unix.listen()
        found = listening_ports() - before
        assert found == {server.getsockname()[1], server6.getsockname()[1]}
    assert listening_ports() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a descriptor is left"


@pytest.fixture
def publishers():
    """Listen as the runtime's publishers do: on all interfaces."""
    with (
        socket.create_server(("0.0.0.0", 0)) as four,
        socket.create_server(("::", 0), family=socket.AF_INET6) as six,
    ):
        yield four, six


def interface(server):
    return server.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", b"lo"), ("::1", b"lo"), ("192.0.2.1", b""), (None, b"")])
def test_publishers_that_tell_loopback_take_connections_of_this_machine_only(monkeypatch, publishers, host, name):
    if host is None:
        monkeypatch.delenv("DYN_EVENT_PLANE_HOST", raising=False)
    else:
        monkeypatch.setenv("DYN_EVENT_PLANE_HOST", host)
    with socket.create_server(("0.0.0.0", 0)) as earlier, socket.create_server(("127.0.0.1", 0)) as local:
        before = listening_ports() - {each.getsockname()[1] for each in (*publishers, local)}
        make()[1].close_to_others(before)
        assert [interface(each) for each in publishers] == [name, name]
        assert interface(earlier) == interface(local) == b""
    for server in publishers:
        family = "127.0.0.1" if server.family == socket.AF_INET else "::1"
        with socket.create_connection((family, server.getsockname()[1]), 5):
            pass


def test_publishers_that_cannot_be_closed_are_said(monkeypatch, publishers, caplog):
    def refused(before):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv("DYN_EVENT_PLANE_HOST", "127.0.0.1")
    monkeypatch.setattr(runtime_module, "keep_on_loopback", refused)
    make()[1].close_to_others(set())
    assert "Other machines can read this worker's events" in caplog.text


# ---------------------------------------------------------------------------------------------------------------- start


def test_a_runtime_that_does_not_start_says_why(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("lease refused")

    monkeypatch.setattr(runtime_module, "DistributedRuntime", fail)
    with pytest.raises(StartError, match="lease refused"):
        asyncio.run(Runtime.create(worker_settings(discovery_backend="file", discovery_path=tmp_path)))


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


def test_a_runtime_that_panics_says_why_and_names_the_limits(tmp_path, monkeypatch):
    """It takes threads and descriptors for granted."""

    def panic(*args, **options):
        raise PanicException("failed to spawn thread: Resource temporarily unavailable")

    monkeypatch.setattr(runtime_module, "DistributedRuntime", panic)
    with pytest.raises(StartError, match=r"cannot start: PanicException: failed to spawn thread") as raised:
        asyncio.run(Runtime.create(worker_settings(discovery_backend="file", discovery_path=tmp_path)))
    assert "pids.max" in str(raised.value.hint)


def test_the_runtime_gets_a_free_port_of_its_own_for_its_status_server(tmp_path, monkeypatch):
    """It reads the port as a signed 16-bit number, and ours stands in front of it."""
    servers = []

    def start(loop, backend, plane, event_plane):
        assert os.environ["DYN_SYSTEM_PORT"] == "0"
        assert os.environ["DYN_FILE_KV"] == str(tmp_path)
        assert (backend, plane, event_plane) == ("file", "tcp", None)
        servers.append(socket.create_server(("127.0.0.1", 0)))
        return FakeDistributedRuntime()

    monkeypatch.setattr(runtime_module, "DistributedRuntime", start)
    values = worker_settings(discovery_backend="file", discovery_path=tmp_path, system_port=60_000)
    try:
        assert asyncio.run(Runtime.create(values)).status_port == servers[0].getsockname()[1]
    finally:
        servers[0].close()


@pytest.mark.parametrize(
    ("values", "environment", "host"),
    [
        ({}, {}, "0.0.0.0"),
        ({"system_host": "192.0.2.7"}, {}, "192.0.2.7"),
        ({}, {"DYN_SELF_HOST_METADATA": "0"}, "127.0.0.1"),
        ({}, {"DYN_SELF_HOST_METADATA": "False"}, "127.0.0.1"),
        ({}, {"DYN_SELF_HOST_METADATA": "1"}, "0.0.0.0"),
        ({"frontend": "127.0.0.1:8000"}, {}, "127.0.0.1"),
        ({"frontend": "[::1]:8000"}, {}, "127.0.0.1"),
        ({"frontend": "0.0.0.0:8000"}, {}, "0.0.0.0"),
    ],
)
@pytest.mark.parametrize("lora", [None, "true"])
def test_the_runtimes_own_status_server_is_on_loopback_unless_frontends_read_from_it(
    tmp_path, monkeypatch, values, environment, host, lora
):
    """And it has no routes for LoRA adapters, which it would open to everybody."""
    for name, value in {"DYN_LORA_ENABLED": lora, **environment}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    servers = []

    def start(*args, **options):
        assert os.environ["DYN_SYSTEM_HOST"] == host
        assert os.environ["DYN_LORA_ENABLED"] == "false"
        servers.append(socket.create_server(("127.0.0.1", 0)))
        return FakeDistributedRuntime()

    monkeypatch.setattr(runtime_module, "DistributedRuntime", start)
    values = {"discovery_backend": "file", "discovery_path": tmp_path, "system_port": 0, **values}
    try:
        assert asyncio.run(Runtime.create(worker_settings(**values))).status_host == host
        assert os.environ.get("DYN_LORA_ENABLED") == lora
    finally:
        servers[0].close()


def test_a_status_server_that_does_not_come_is_a_failed_start(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_module, "DistributedRuntime", lambda *args, **options: FakeDistributedRuntime())
    values = worker_settings(discovery_backend="file", discovery_path=tmp_path, system_port=0)
    with pytest.raises(StartError, match="is not listening on 0"):
        asyncio.run(Runtime.create(values))


# --------------------------------------------------------------------------------------------------------- life


def test_endpoints_have_the_path_of_the_settings():
    async def main():
        fake, runtime = make(namespace="ns", component="comp", endpoint="gen")
        runtime.endpoint("clear")
        runtime.endpoint("clear")
        assert runtime.worker_id == 0x4EC5C2A6E8130C29
        assert sorted(fake.endpoints) == ["ns.comp.clear", "ns.comp.gen"]

    asyncio.run(main())


def test_registration_is_recorded_before_it_is_made(tmp_path, monkeypatch):
    async def main():
        _, runtime = make(discovery_backend="file")
        monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
        runtime.record_registration(tmp_path)
        (entry,) = ledger.registrations(tmp_path)
        assert (entry["backend"], entry["root"]) == ("file", str(tmp_path / "kv"))
        assert entry["instance"] == "4ec5c2a6e8130c29"

    asyncio.run(main())


def test_with_etcd_the_lease_is_recorded_and_no_address(tmp_path):
    """The instance id is the lease; an address, which may hold a password, is nothing for a file."""

    async def main():
        _, runtime = make(discovery_backend="etcd")
        runtime.record_registration(tmp_path)
        (entry,) = ledger.registrations(tmp_path)
        assert entry == {"kind": "registration", "backend": "etcd", "instance": "4ec5c2a6e8130c29"}

    asyncio.run(main())


def test_endpoints_are_served_as_they_are_specified():
    async def main():
        fake, runtime = make()

        def handler():
            pass

        runtime.serve(EndpointSpec("generate", metrics_labels=(("model", "m"),)), handler)
        runtime.serve(EndpointSpec("clear", graceful_shutdown=False), handler)
        await settle()
        assert fake.endpoints["dynamo.backend.generate"].served == [(handler, True, [("model", "m")])]
        assert fake.endpoints["dynamo.backend.clear"].served == [(handler, False, None)]
        for endpoint in fake.endpoints.values():
            endpoint.closed.set()
        await runtime.shutdown(5)
        assert fake.shut_down

    asyncio.run(main())


def test_a_worker_that_unregisters_does_not_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    (tmp_path / "4ec5c2a6e8130c29").write_text("entry")

    async def main():
        _, runtime = make(discovery_backend="file", discovery_timeout=7)
        registration = await runtime.watch_registration(lambda error: None)
        watching = asyncio.ensure_future(registration.run())
        await until(lambda: registration._call is not None and registration._call.done())
        registration.problem = "out"
        assert runtime.problem == "out"
        await runtime.unregister()
        (tmp_path / "4ec5c2a6e8130c29").unlink()
        await asyncio.wait({watching}, timeout=5)
        assert watching.done()
        assert not list(tmp_path.iterdir())

    asyncio.run(main())


def test_the_watch_begins_once_all_that_is_served_is_in_discovery(tmp_path, monkeypatch, caplog):
    """The runtime registers endpoints some time after it was asked to serve them."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    monkeypatch.setattr(registration_module, "_ENTER", 0.3)

    async def main():
        _, runtime = make(discovery_backend="file", discovery_timeout=7)
        runtime.serve(EndpointSpec("generate"), None)
        watching = asyncio.ensure_future(runtime.watch_registration(lambda error: None))
        await asyncio.sleep(0.1)
        assert not watching.done()
        (tmp_path / "4ec5c2a6e8130c29").write_text("entry")
        assert await watching is not None
        assert not caplog.records
        runtime.serve(EndpointSpec("other"), None)
        assert await runtime.watch_registration(lambda error: None) is not None
        assert "Not all of the worker's entries are in discovery yet" in caplog.text

    asyncio.run(main())


def test_what_cannot_be_watched_is_not():
    _, runtime = make(discovery_backend="mem")
    assert asyncio.run(runtime.watch_registration(lambda error: None)) is None
    assert runtime.problem is None


def test_unregistering_tries_every_endpoint_and_tells_whether_all_are_out(caplog):
    async def main():
        fake, runtime = make()
        for name in ("a", "b", "c"):
            runtime.endpoint(name)
        assert await runtime.unregister() is True
        fake.endpoints["dynamo.backend.b"].error = RuntimeError("etcd: deadline exceeded")
        assert await runtime.unregister() is False, "what is not out, the supervisor has to withdraw"
        assert [endpoint.left for endpoint in fake.endpoints.values()] == [2] * 4, "its main endpoint among them"

    asyncio.run(main())
    (record,) = caplog.records
    assert record.fields["endpoint"] == "b"


def test_what_has_left_already_is_not_unregistered_again(caplog):
    """The runtime would report an error, and the supervisor would have to withdraw the rest."""

    async def main():
        fake, runtime = make()
        serving = [runtime.serve(EndpointSpec(name), None) for name in ("generate", "other")]
        await runtime.discovery.leave()
        assert await runtime.unregister() is True
        assert {path: endpoint.left for path, endpoint in fake.endpoints.items()} == {
            "dynamo.backend.generate": 1,
            "dynamo.backend.other": 1,
        }
        for task in serving:
            task.cancel()

    asyncio.run(main())
    assert caplog.records == []


def test_a_shutdown_that_does_not_end_is_bounded(caplog):
    async def main():
        _, runtime = make()
        task = runtime.serve(EndpointSpec("generate"), None)
        started = time.monotonic()
        await runtime.shutdown(0.05)
        assert 0.04 < time.monotonic() - started < 2
        task.cancel()

    asyncio.run(main())
    assert "Endpoints still open" in caplog.text


def test_a_shutdown_waits_until_the_endpoints_are_closed():
    async def main():
        fake, runtime = make()
        task = runtime.serve(EndpointSpec("generate"), None)
        await until(lambda: fake.endpoints)
        asyncio.get_running_loop().call_later(0.02, fake.endpoints["dynamo.backend.generate"].closed.set)
        await runtime.shutdown(5)
        assert task.done()

    asyncio.run(main())


def test_readiness_and_metrics_go_to_the_runtime():
    async def main():
        fake, runtime = make()
        runtime.set_ready(True)
        runtime.set_ready(False)
        runtime.expose_metrics(lambda: "metrics", endpoint="generate")
        assert fake.health == [True, False]
        assert fake.endpoints["dynamo.backend.generate"].exposition() == "metrics"

    asyncio.run(main())


def test_a_headless_rank_registers_nothing(monkeypatch):
    monkeypatch.setattr(model_card, "register_model", None)

    async def main():
        _, runtime = make()
        await runtime.register(EngineInfo("m", None), endpoint="generate")
        assert runtime.discovery.model is None

    asyncio.run(main())
