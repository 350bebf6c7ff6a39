"""The servers that the runtime needs are waited for, for a limited time."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.errors import ServerUnreachableError, StartError, UsageError
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


def waiting(**values):
    settings = worker_settings(**values)
    return servers.wait_for_servers(
        settings.discovery_backend, settings.request_plane, settings.event_plane, settings.discovery_timeout
    )


def wait(**values):
    return asyncio.run(waiting(**values))


class Server:
    """A server that reads what it is sent and answers each time with the next of its lines."""

    def __init__(self, *lines, greets=False):
        self._lines = lines
        self._greets = greets
        self.received = b""
        self._serving = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await asyncio.gather(*self._serving)

    async def _serve(self, reader, writer):
        self._serving.append(asyncio.current_task())
        lines = list(self._lines)
        if self._greets:
            writer.write(lines.pop(0))
        while data := await reader.read(65536):
            self.received += data
            if lines:
                writer.write(lines.pop(0))
            if not lines and not self._greets:
                break
        writer.close()
        await writer.wait_closed()


ETCD_ANSWER = b"HTTP/1.0 200 OK\r\n\r\n{}"


def test_an_unreachable_etcd_ends_the_start_with_address_and_reason(closed_port, monkeypatch, caplog):
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{closed_port}")
    started = time.monotonic()
    with pytest.raises(ServerUnreachableError) as raised:
        wait(discovery_backend="etcd", discovery_timeout=0.7)
    assert 0.7 <= time.monotonic() - started < 3
    message = str(raised.value)
    assert f"etcd cannot be reached (http://127.0.0.1:{closed_port}: Connection refused); waited 0.7 s" in message
    assert "ETCD_ENDPOINTS" in raised.value.hint
    assert "--discovery-backend file" in raised.value.hint
    assert [record.getMessage() for record in caplog.records] == ["Waiting for a server"], "said once"


def test_all_addresses_are_tried_and_named(closed_port, monkeypatch):
    monkeypatch.setenv("ETCD_ENDPOINTS", f"127.0.0.1:{closed_port}, http://localhost:{closed_port},")
    with pytest.raises(ServerUnreachableError) as raised:
        wait(discovery_backend="etcd", discovery_timeout=0.1)
    assert f"127.0.0.1:{closed_port}: Connection refused; http://localhost:{closed_port}: " in str(raised.value)


def test_one_address_that_answers_is_enough(closed_port, monkeypatch):
    async def main():
        async with Server(ETCD_ANSWER) as server:
            monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{closed_port},http://127.0.0.1:{server.port}")
            await waiting(discovery_backend="etcd", discovery_timeout=5)

    asyncio.run(main())


def test_a_server_that_starts_late_is_waited_for(monkeypatch):
    """One that accepts connections and does not answer yet has not started."""

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            port = deaf.getsockname()[1]
            monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{port}")
            task = asyncio.ensure_future(waiting(discovery_backend="etcd", discovery_timeout=30))
            await asyncio.sleep(0.1)
            assert not task.done()
        async with Server(ETCD_ANSWER) as server:
            monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{server.port}")
            task.cancel()
            await asyncio.wait_for(waiting(discovery_backend="etcd", discovery_timeout=30), 5)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("variable", "scheme", "values"),
    [("ETCD_ENDPOINTS", "http", {"discovery_backend": "etcd"}), ("NATS_SERVER", "nats", {"request_plane": "nats"})],
)
def test_a_server_that_accepts_and_never_answers_is_not_there(monkeypatch, variable, scheme, values):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"{scheme}://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv(variable, address)
        started = time.monotonic()
        with pytest.raises(ServerUnreachableError) as raised:
            wait(**{"discovery_backend": "file", "discovery_timeout": 0.5, **values})
        assert time.monotonic() - started < 2
        assert f"{address}: " in str(raised.value)
        assert "accepted" in str(raised.value)
        assert "did not answer" in str(raised.value)


def test_etcd_that_rejects_the_user_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("ETCD_AUTH_USERNAME", "root")
    refusal = b'HTTP/1.0 400 Bad\r\n\r\n{"message": "authentication failed, invalid user ID or password"}'

    async def main():
        async with Server(refusal) as server:
            monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{server.port}")
            with pytest.raises(StartError, match="rejects this user: authentication failed") as raised:
                await waiting(discovery_backend="etcd", discovery_timeout=30)
            assert "ETCD_AUTH_PASSWORD" in raised.value.hint

    asyncio.run(main())


def test_nats_gets_the_credentials_and_may_reject_them(monkeypatch):
    monkeypatch.setenv("NATS_AUTH_USERNAME", "me")
    monkeypatch.setenv("NATS_AUTH_PASSWORD", "secret")

    async def main():
        for answer in (b"PONG\r\n", b"-ERR 'Authorization Violation'\r\n"):
            async with Server(b'INFO {"auth_required": true}\r\n', answer, greets=True) as server:
                monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{server.port}")
                waited = waiting(discovery_backend="file", discovery_timeout=5, request_plane="nats")
                if answer.startswith(b"PONG"):
                    await waited
                else:
                    with pytest.raises(StartError, match="rejects this user: -ERR 'Authorization Violation'"):
                        await waited
                assert b'"user": "me", "pass": "secret"' in server.received

    asyncio.run(main())


def test_something_else_than_nats_is_said(monkeypatch):
    async def main():
        async with Server(b"220 mail.example ESMTP\r\n", greets=True) as server:
            monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{server.port}")
            with pytest.raises(ServerUnreachableError, match="not a NATS server: it says b'220 mail"):
                await waiting(discovery_backend="file", discovery_timeout=0.1, request_plane="nats")

    asyncio.run(main())


@pytest.mark.parametrize(
    "values", [{"request_plane": "nats"}, {"event_plane": "nats"}], ids=["request plane", "event plane"]
)
def test_nats_is_waited_for_where_it_is_used(closed_port, monkeypatch, values):
    monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{closed_port}")
    with pytest.raises(ServerUnreachableError, match="NATS cannot be reached") as raised:
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
