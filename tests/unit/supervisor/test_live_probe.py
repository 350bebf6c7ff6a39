"""The door of the status server, with real sockets at both ends."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import socket
import time

import pytest

from dynamo_worker.supervisor import channel, live_probe
from dynamo_worker.supervisor.live_probe import LiveProbe
from dynamo_worker.supervisor.loop import Loop

PROBE = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"


class World:
    """A supervisor's loop with a door, the worker's end of it, and clients."""

    def __init__(self, loop):
        self.loop = loop
        self.watched = True
        self.probe = LiveProbe(loop, lambda: "SERVING", lambda: self.watched)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.worker, theirs = channel.pair()
        self.worker.settimeout(2)
        self.probe.open([self.listener.detach(), theirs.detach()], "/live")
        self.clients = []

    def client(self, data=b""):
        """Connect, send something, and let the door see it."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        self.clients.append(connection)
        connection.settimeout(2)
        if data:
            connection.sendall(data)
        self.pump()
        return connection

    def pump(self):
        for _ in range(4):
            self.loop.pump(0.002)

    def passed_on(self):
        """Return what the worker gets: the bytes that were read, and the connection."""
        data, descriptors, _, _ = socket.recv_fds(self.worker, 1 << 16, 1)
        return data, socket.socket(fileno=descriptors[0])


@pytest.fixture
def world():
    handler = signal.getsignal(signal.SIGCHLD)
    loop = Loop((), lambda number: None, lambda pid, code: None)
    it = World(loop)
    yield it
    it.probe.close()
    it.worker.close()
    for connection in it.clients:
        connection.close()
    loop.close()
    signal.signal(signal.SIGCHLD, handler)


def everything(connection):
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(4096):
            data += part
    return data


@pytest.mark.parametrize(
    "request_", [PROBE, PROBE * 2, b"GET /live?x=1 HTTP/1.0\r\n\r\n", b"HEAD /live HTTP/1.1\r\n\r\n"]
)
def test_the_probe_is_answered_without_the_worker(world, request_):
    head, _, body = everything(world.client(request_)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in head
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body) == {"status": "live", "state": "SERVING"}


def test_the_probe_may_come_in_pieces(world):
    connection = world.client()
    for piece in (b"GET /li", b"ve HTTP/1.1\r", b"\nhost: x\r\n", b"\r\n"):
        connection.sendall(piece)
        world.pump()
    assert everything(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /metrics HTTP/1.1\r\n",
        b"POST /engine/x HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET //live HTTP/1.1\r\n\r\n",
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"GET /live HTTP/1.1\r\nhost: x\n\nPOST /other HTTP/1.1\r\n\r\n",
        b"GET /live HTTP/1.1\r\nhost: x\0\r\n\r\n",
        b"x" * 16 * 1024,
        b"GET /live HTTP/1.1\r\nx: " + b"x" * (16 * 1024 - 23),
    ],
)
def test_everything_else_is_the_workers(world, request_):
    connection = world.client(request_)
    data, passed = world.passed_on()
    with passed:
        assert data == request_
        passed.sendall(b"from the worker")
    assert everything(connection) == b"from the worker"


def test_half_a_request_is_the_workers_when_its_client_has_ended_it(world):
    connection = world.client(b"GET /live")
    connection.shutdown(socket.SHUT_WR)
    world.pump()
    data, passed = world.passed_on()
    passed.close()
    assert data == b"GET /live"


def test_an_unwatched_worker_answers_itself(world):
    world.watched = False
    world.client(PROBE)
    data, passed = world.passed_on()
    passed.close()
    assert data == PROBE


def test_a_blocked_worker_keeps_nobody_from_the_probe(world):
    """What it does not take waits in the socket, then here; too many push the oldest of these out."""
    for number in range(500):
        world.client(b"GET /%d HTTP/1.1\r\n\r\n" % number)
    assert everything(world.client(PROBE)).startswith(b"HTTP/1.1 200 ")
    assert len(world.probe._waiting) == 64
    world.worker.setblocking(False)
    taken = []
    for _ in range(500):
        try:
            data, passed = world.passed_on()
        except BlockingIOError:
            if not world.probe._waiting:
                break
            world.pump()
        else:
            passed.close()
            taken.append(data)
    assert 200 < len(taken) < 500
    assert taken[-64:] == [b"GET /%d HTTP/1.1\r\n\r\n" % number for number in range(436, 500)]
    world.client(b"GET /x HTTP/1.1\r\n\r\n")
    world.passed_on()[1].close()


def test_silent_clients_neither_crowd_out_the_probe_nor_stay(world):
    silent = [world.client() for _ in range(80)]
    assert everything(world.client(PROBE)).startswith(b"HTTP/1.1 200 ")
    assert len(world.probe._silent) == 64
    assert everything(silent[0]) == b""
    for client in world.probe._silent.values():
        client.give_up_at = time.monotonic()
    assert world.probe.next_timer() <= time.monotonic()
    world.probe.act_on_time()
    assert everything(silent[-1]).startswith(b"HTTP/1.1 400 ")
    assert world.probe.next_timer() is None


def test_who_has_asked_is_answered_before_it_has_to_make_room(world, monkeypatch):
    monkeypatch.setattr(world.probe, "_most_silent", 4)
    first = world.client()
    connections = [socket.create_connection(("127.0.0.1", world.port)) for _ in range(8)]
    world.clients += connections
    first.sendall(PROBE)
    world.probe._accept()
    assert everything(first).startswith(b"HTTP/1.1 200 ")


def test_out_of_descriptors_it_pauses(world, monkeypatch):
    class Full:
        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

        def __getattr__(self, name):
            return getattr(listener, name)

    monkeypatch.setattr(live_probe, "_PAUSE", 30.0)
    listener = world.probe._listener
    world.probe._listener = Full()
    connection = world.client(PROBE)
    assert 0 < world.probe.next_timer() - time.monotonic() <= 30
    world.probe._listener = listener
    world.probe._paused_until = time.monotonic()
    world.probe.act_on_time()
    world.pump()
    assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_the_port_is_free_when_the_worker_has_closed_its_end(world):
    silent = world.client()
    world.worker.close()
    world.pump()
    assert everything(silent) == b""
    with socket.create_server(("127.0.0.1", world.port)):
        pass
    assert world.probe.next_timer() is None
