"""One request ends by its deadline, whatever the server does, and says what that was."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from dynamo_worker.supervisor import http_request


@contextlib.contextmanager
def server(serve):
    """A server that handles one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    thread.join(10)


def get(address, seconds=5.0):
    return http_request.send("GET", address, "/path", b"body", {"Name": "value"}, time.monotonic() + seconds, None)


def test_the_answer():
    received = []

    def serve(connection):
        received.append(connection.recv(4096))
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\n\r\nsome ")
        connection.sendall(b"text\r\n\r\n")

    with server(serve) as address:
        assert get(address) == (201, b"some text\r\n\r\n")
    assert received[0].startswith(b"GET /path HTTP/1.0\r\nHost: 127.0.0.1:")
    assert received[0].endswith(b"Content-Length: 4\r\nName: value\r\n\r\nbody")


def test_a_server_that_drips_its_answer():
    """Each piece comes in time, but the whole does not."""

    def serve(connection):
        for _ in range(100):
            connection.sendall(b"H")
            time.sleep(0.05)

    with server(serve) as address:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="it accepted, and did not answer within"):
            get(address, 0.3)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"", "it closed the connection"), (b"SSH-2.0-x\r\n", "not an HTTP server: it answers b'SSH-2.0-x")],
)
def test_what_is_no_answer(answer, said):
    def serve(connection):
        connection.recv(4096)
        connection.sendall(answer)

    with server(serve) as address, pytest.raises(OSError, match=said):
        get(address)


def test_no_time_left():
    with pytest.raises(TimeoutError):
        get("127.0.0.1:1", -1.0)


@pytest.mark.parametrize(
    ("address", "split"),
    [("etcd", ("etcd", 2379)), ("etcd:1", ("etcd", 1)), ("[::1]:2", ("::1", 2)), ("[::1]", ("::1", 2379))],
)
def test_addresses(address, split):
    assert http_request._split(address) == split
