"""The servers that the runtime needs are waited for, for a limited time."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.discovery import servers

pytestmark = pytest.mark.usefixtures("environment")


def worker_settings(**values):
    return WorkerSettings(engine="echo", **values)


@pytest.fixture
def closed_port():
    """Return a port on which nobody listens, and nobody will while the test runs."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def wait(**values):
    return asyncio.run(servers.wait_for_servers(worker_settings(**values)))


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
                servers.wait_for_servers(worker_settings(discovery_backend="etcd", discovery_timeout=30))
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
    assert servers._host_and_port(text, "NATS_SERVER", "nats://localhost:4222") == expected


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    for value in ("", " ", ",", " , "):
        monkeypatch.setenv("ETCD_ENDPOINTS", value)
        assert servers.addresses("ETCD_ENDPOINTS", "http://localhost:2379") == ["http://localhost:2379"]


@given(st.builds(OSError, st.none() | st.integers(1, 130), st.text()) | st.builds(asyncio.TimeoutError))
def test_every_problem_has_a_reason(error):
    assert servers._connection_problem(error)


def test_a_name_that_does_not_resolve_is_said_in_words():
    problem = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert "Name or service not known" in servers._connection_problem(problem)
