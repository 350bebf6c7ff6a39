"""What surrounds the Dynamo runtime: servers it needs, directories, names, ports, and how it is ended."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from unittest.mock import Mock

import pytest
from aio import settle, until
from dynamo.llm import ModelType
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host import model_card
from dynamo_worker.host import registration as registration_module
from dynamo_worker.host import runtime as runtime_module
from dynamo_worker.host.listening import listening_ports
from dynamo_worker.host.model_card import model_type
from dynamo_worker.host.runtime import Runtime
from dynamo_worker.host.settings import WorkerSettings
from dynamo_worker.supervisor import ledger


def worker_settings(**values):
    return WorkerSettings(engine="echo", **values)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Keep what the module writes into the environment out of other tests."""
    for name in ("ETCD_ENDPOINTS", "NATS_SERVER", "DYN_FILE_KV", "DYN_SYSTEM_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def closed_port():
    """Return a port on which nobody listens, and nobody will while the test runs."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


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


# ------------------------------------------------------------------------------------------------------- model types


def test_model_types_are_those_of_dynamo():
    assert str(model_type(["chat"])) == str(ModelType.Chat)
    assert str(model_type(["chat", "completions"])) == str(ModelType.Chat | ModelType.Completions)
    assert str(model_type(["completions", "chat", "chat"])) == str(ModelType.Chat | ModelType.Completions)


def test_an_unknown_surface_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="'chatt' is unknown") as raised:
        model_type(["chat", "chatt"])
    assert "completions" in str(raised.value)


def test_no_surface_at_all():
    with pytest.raises(UsageError, match="at least one"):
        model_type([])


def test_every_engines_default_is_known():
    model_type(EngineInfo("m", "/m").endpoint_types)


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


# ------------------------------------------------------------------------------------------------ servers it waits for


def wait(**values):
    return asyncio.run(runtime_module._wait_for_servers(worker_settings(**values)))


def test_an_unreachable_etcd_ends_the_start_with_address_and_reason(closed_port, monkeypatch, caplog):
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{closed_port}")
    started = time.monotonic()
    with pytest.raises(StartError) as raised:
        wait(discovery_backend="etcd", discovery_timeout=0.7)
    assert 0.7 <= time.monotonic() - started < 3
    message = str(raised.value)
    assert f"etcd cannot be reached (http://127.0.0.1:{closed_port}: Connection refused); waited 0.7 s" in message
    assert "ETCD_ENDPOINTS" in raised.value.hint
    assert "--discovery-backend file" in raised.value.hint
    assert [record.getMessage() for record in caplog.records] == ["Waiting for a server"], "said once"


def test_all_addresses_are_tried_and_named(closed_port, monkeypatch):
    monkeypatch.setenv("ETCD_ENDPOINTS", f"127.0.0.1:{closed_port}, http://localhost:{closed_port},")
    with pytest.raises(StartError) as raised:
        wait(discovery_backend="etcd", discovery_timeout=0.1)
    assert f"127.0.0.1:{closed_port}: Connection refused; http://localhost:{closed_port}: " in str(raised.value)


def test_one_address_that_answers_is_enough(closed_port, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{closed_port},http://127.0.0.1:{port}")
        wait(discovery_backend="etcd", discovery_timeout=5)


def test_a_server_that_starts_late_is_waited_for(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{server.getsockname()[1]}")

        async def main():
            waiting = asyncio.ensure_future(
                runtime_module._wait_for_servers(worker_settings(discovery_backend="etcd", discovery_timeout=30))
            )
            await asyncio.sleep(0.1)
            assert not waiting.done()
            server.listen()
            await asyncio.wait_for(waiting, 5)

        asyncio.run(main())


@pytest.mark.parametrize(
    "values", [{"request_plane": "nats"}, {"event_plane": "nats"}], ids=["request plane", "event plane"]
)
def test_nats_is_waited_for_where_it_is_used(closed_port, monkeypatch, values):
    monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{closed_port}")
    with pytest.raises(StartError, match="NATS cannot be reached") as raised:
        wait(discovery_backend="file", discovery_timeout=0.1, **values)
    assert "NATS_SERVER" in raised.value.hint


def test_nothing_is_waited_for_that_is_not_used(closed_port, monkeypatch):
    monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{closed_port}")
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{closed_port}")
    wait(discovery_backend="file")
    wait(discovery_backend="mem")
    wait(discovery_backend="kubernetes")


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1"])
def test_what_is_no_address_is_a_mistake_of_the_configuration(monkeypatch, address):
    monkeypatch.setenv("ETCD_ENDPOINTS", address)
    with pytest.raises(UsageError, match="ETCD_ENDPOINTS"):
        wait(discovery_backend="etcd", discovery_timeout=30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nats://nats.svc", ("nats.svc", 4222)),
        ("nats://user:secret@nats.svc:4333", ("nats.svc", 4333)),
        ("10.0.0.1:4333", ("10.0.0.1", 4333)),
        ("nats://[::1]:4333", ("::1", 4333)),
    ],
)
def test_addresses(text, expected):
    assert runtime_module._host_and_port(text, "NATS_SERVER", "nats://localhost:4222") == expected


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    for value in ("", " ", ",", " , "):
        monkeypatch.setenv("ETCD_ENDPOINTS", value)
        assert runtime_module.addresses("ETCD_ENDPOINTS", "http://localhost:2379") == ["http://localhost:2379"]


@given(st.builds(OSError, st.none() | st.integers(1, 130), st.text()) | st.builds(asyncio.TimeoutError))
def test_every_problem_has_a_reason(error):
    assert runtime_module._connection_problem(error)


def test_a_name_that_does_not_resolve_is_said_in_words():
    problem = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert "Name or service not known" in runtime_module._connection_problem(problem)


# --------------------------------------------------------------------------------------------------------- directories


def test_the_discovery_directory_is_created(tmp_path):
    directory = tmp_path / "a" / "b"
    assert runtime_module.writable_directory(directory) == directory
    assert directory.stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mask", [0, 0o002, 0o022, 0o077])
def test_whatever_the_umask_all_of_it_is_private(tmp_path, mask):
    """002 is usual where every user has a group of its own; the directory above would then be refused."""
    before = os.umask(mask)
    try:
        assert runtime_module.writable_directory(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o7777 == (tmp_path / "a" / "b").stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o2775, 0o770, 0o755])
def test_a_directory_of_ours_is_closed_to_others(tmp_path, mode, caplog):
    """What the runtime makes in it has the mode that the umask says: the group may write there on many clusters."""
    directory = tmp_path / "kv"
    (directory / "v1" / "instances").mkdir(parents=True)
    (directory / "v1").chmod(0o775)
    directory.chmod(mode)
    assert runtime_module.writable_directory(directory) == directory
    assert directory.stat().st_mode & 0o7777 == mode & 0o7700 | 0o700
    (record,) = caplog.records
    assert record.message == "Discovery directory closed to other users"
    assert runtime_module.writable_directory(directory) == directory
    assert len(caplog.records) == 1


def test_what_is_in_a_directory_that_only_we_write_in_is_ours(tmp_path):
    (tmp_path / "bin").mkdir()
    tmp_path.chmod(0o755)
    assert runtime_module.writable_directory(tmp_path) == tmp_path
    assert tmp_path.stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_directory_that_is_not_for_discovery_alone_is_not_closed(tmp_path, mode):
    """Such as /tmp or / for root."""
    (tmp_path / "bin").mkdir()
    tmp_path.chmod(mode)
    with pytest.raises(
        UsageError,
        match=rf"the discovery directory {tmp_path} is open to others \(mode {mode:04o}\), .* something else",
    ) as raised:
        runtime_module.writable_directory(tmp_path)
    assert "--discovery-path" in raised.value.hint
    assert tmp_path.stat().st_mode & 0o7777 == mode


def test_a_directory_with_the_sticky_bit_is_not_closed(tmp_path):
    """It is meant for several users, such as the /tmp of a container, empty as it may be."""
    tmp_path.chmod(0o1777)
    with pytest.raises(UsageError, match=r"is open to others \(mode 1777\)"):
        runtime_module.writable_directory(tmp_path)
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("mode", [0o777, 0o755])
@pytest.mark.parametrize("error", [None, PermissionError(errno.EPERM, "Operation not permitted")])
def test_a_file_system_that_has_modes_of_its_own(tmp_path, monkeypatch, caplog, mode, error):
    """Such as CIFS: all that is made there has the mode that the mount says, and keeps it."""
    tmp_path.chmod(mode)
    monkeypatch.setattr(os, "chmod", Mock(side_effect=error))
    if mode == 0o755:
        assert runtime_module.writable_directory(tmp_path) == tmp_path
    else:
        with pytest.raises(
            UsageError, match=r"is open to others \(mode 0777\), .* does not let it be closed"
        ) as raised:
            runtime_module.writable_directory(tmp_path)
        assert "--discovery-path" in raised.value.hint
    assert not caplog.records


def test_a_link_on_the_way_may_lead_elsewhere_later(tmp_path):
    for name in ("work", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    directory = runtime_module.writable_directory(tmp_path / "link" / "kv")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert directory == tmp_path / "work" / "kv"
    assert directory.is_dir()


def test_nothing_is_made_in_a_directory_of_another_user(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    with pytest.raises(UsageError, match=rf"is not safe, .*: {home} belongs to another user \(12345\)") as raised:
        runtime_module.writable_directory(home / "a" / "kv")
    assert raised.value.hint == "give --discovery-path a directory of your own"
    assert not list(home.iterdir())


@pytest.mark.parametrize("what", ["directory", "link"])
def test_a_directory_of_another_user_is_refused(tmp_path, what):
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    ours, path = tmp_path / "ours", tmp_path / "kv"
    ours.mkdir()
    path.mkdir() if what == "directory" else path.symlink_to(ours)
    os.chown(path, 12345, 12345, follow_symlinks=False)
    with pytest.raises(UsageError, match=r"belongs to another user \(12345\)") as raised:
        runtime_module.writable_directory(path)
    assert "--discovery-path" in raised.value.hint


def test_a_directory_below_one_that_others_may_write_is_refused(tmp_path):
    """Who may rename it can put another one in its place."""
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o777)
    (above / "kv").mkdir(0o700)
    for path in (above / "kv", above / "fresh"):
        with pytest.raises(
            UsageError, match=rf"is not safe, .*: others may write in {above}, which has no sticky bit"
        ) as raised:
            runtime_module.writable_directory(path)
        assert raised.value.hint == f"chmod go-w {above}, or +t; or give --discovery-path a directory of your own"
    assert not (above / "fresh").exists()
    above.chmod(0o1777)
    assert runtime_module.writable_directory(above / "kv") == above / "kv"


def test_without_a_setting_the_directory_is_dynamos(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
    assert runtime_module.writable_directory(None) == tmp_path / "kv"


def test_a_file_in_the_way_says_so(tmp_path):
    path = tmp_path / "file"
    path.touch()
    for directory in (path, path / "below"):
        with pytest.raises(UsageError, match="cannot be created") as raised:
            runtime_module.writable_directory(directory)
        assert str(directory) in str(raised.value)
        assert "--discovery-path" in raised.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else_says_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="is not writable"):
        runtime_module.writable_directory(tmp_path)


def test_a_directory_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="is not writable"):
        runtime_module.writable_directory(tmp_path)


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
    with pytest.raises(StartError, match=r"does not start: PanicException: failed to spawn thread") as raised:
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
    with pytest.raises(StartError, match="does not listen"):
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
        runtime.record_registration(None)

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


# ------------------------------------------------------------------------------------------------------- registration


def register(monkeypatch, info, **values):
    calls = []

    async def record(*args, **options):
        calls.append((args, options))

    monkeypatch.setattr(model_card, "register_model", record)

    async def main():
        _, runtime = make(**values)
        await runtime.register(info, endpoint="generate")

    asyncio.run(main())
    return calls


def test_a_model_is_registered_with_what_the_engine_knows(monkeypatch):
    info = EngineInfo(
        "llama",
        "/models/llama",
        model_aliases=("l",),
        worker_type="prefill",
        needs=(("decode",),),
        kv_block_size=16,
        context_length=4096,
        total_kv_blocks=1000,
        max_num_seqs=64,
        bootstrap=("10.0.0.1", 8998),
        runtime_data={"flavour": "sour", "ranks": [0, 1]},
    )
    ((args, options),) = register(monkeypatch, info, tool_call_parser="hermes")
    assert args[3:5] == ("/models/llama", "llama")
    assert str(args[1]) == str(ModelType.Chat | ModelType.Completions)
    assert str(options["worker_type"]).lower().endswith("prefill")
    assert [[str(peer).lower().rpartition(".")[2] for peer in peers] for peers in options["needs"]] == [["decode"]]
    assert options["kv_cache_block_size"] == 16
    assert options["model_aliases"] == ["l"]
    config = options["runtime_config"]
    assert (config.context_length, config.total_kv_blocks, config.max_num_seqs) == (4096, 1000, 64)
    assert config.tool_call_parser == "hermes"
    assert config.reasoning_parser is None
    assert config.get_engine_specific("flavour") == "sour"


def test_the_settings_overrule_the_engines_surfaces(monkeypatch):
    ((args, _),) = register(monkeypatch, EngineInfo("m", "/m"), endpoint_types=("embedding",))
    assert str(args[1]) == str(ModelType.Embedding)


def test_a_headless_rank_registers_nothing(monkeypatch):
    assert register(monkeypatch, EngineInfo("m", None)) == []


@pytest.mark.parametrize(
    ("planted", "reason"),
    [("nothing", "No such file"), ("directory", "Not a regular file"), ("fifo", "Not a regular file")],
)
def test_a_chat_template_that_is_none_is_named(monkeypatch, tmp_path, planted, reason):
    """The runtime would read a FIFO without end."""
    path = tmp_path / "chat.jinja"
    if planted == "directory":
        path.mkdir()
    elif planted == "fifo":
        os.mkfifo(path)
    with pytest.raises(StartError, match=rf"--custom-jinja-template {path} .*cannot be read: {reason}"):
        register(monkeypatch, EngineInfo("m", "/m"), custom_jinja_template=path)


def test_a_chat_template_without_end_is_none(monkeypatch, tmp_path):
    path = tmp_path / "chat.jinja"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(StartError, match=rf"--custom-jinja-template {path} .*has 1073741824 bytes"):
        register(monkeypatch, EngineInfo("m", "/m"), custom_jinja_template=path)


def test_a_chat_template_is_handed_over(monkeypatch, tmp_path):
    (tmp_path / "data").write_text("{{ messages }}")
    (tmp_path / "chat.jinja").symlink_to("data")
    ((_, options),) = register(monkeypatch, EngineInfo("m", "/m"), custom_jinja_template=tmp_path / "chat.jinja")
    assert options["custom_template_path"] == str(tmp_path / "chat.jinja")


def test_a_model_that_cannot_be_registered_is_named(monkeypatch):
    async def fail(*args, **options):
        raise RuntimeError("no tokenizer.json")

    monkeypatch.setattr(model_card, "register_model", fail)

    async def main():
        _, runtime = make()
        await runtime.register(EngineInfo("llama", "/models/llama"), endpoint="generate")

    with pytest.raises(StartError, match=r"'llama' at /models/llama cannot be registered: no tokenizer\.json"):
        asyncio.run(main())
