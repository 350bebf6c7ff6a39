"""Clients that do not read what they asked for hold up nobody else, and are given up in the end."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from dynamo_worker.testing import eventually
from dynamo_worker.testing.client import chat

from .conftest import FaultyCluster

#: Chunks of some kilobytes: the buffers between worker and client are full after a few thousand.
FLOOD = 60_000

Unread = Callable[[int], list[socket.socket]]


@pytest.fixture
def unread(faulty: FaultyCluster) -> Iterator[Unread]:
    """Return a function that makes so many requests whose answers nobody reads."""
    connections: list[socket.socket] = []

    def ask(count: int) -> list[socket.socket]:
        parts = urlsplit(faulty.cluster.url)
        body = json.dumps(chat("echo", "flood", FLOOD, logprobs=True, top_logprobs=20)).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\n"
            f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        for _ in range(count):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((parts.hostname or "", parts.port or 0))
            connection.sendall(head.encode() + body)
            connections.append(connection)
        return connections

    yield ask
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("push", [False, True], ids=["generate", "push"])
def test_clients_that_do_not_read_hold_up_nobody_else(faulty: FaultyCluster, unread: Unread, push: bool) -> None:
    arguments = ["--push"] if push else []
    worker = faulty.serving("--heartbeat-timeout", "5", "--tokens-per-second", "2000", *arguments)
    connections = unread(3)
    eventually(lambda: worker.metric("dynamo_worker_slow_clients") == 3, 60, "all three are slow")
    # Longer than the heartbeat timeout: an event loop that is held up would be the worker's end.
    load = faulty.cluster.load(4, 10_000)
    assert all(result.ok for result in load.wait()), load.summary()
    assert worker.metric("dynamo_worker_slow_clients") == 3
    for connection in connections:
        connection.close()
    eventually(lambda: worker.metric("dynamo_worker_in_flight") == 0, 20, "the clients are gone")
    eventually(lambda: worker.metric("dynamo_worker_slow_clients") == 0, 20, "their threads are free")
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_a_client_that_does_not_read_is_given_up(faulty: FaultyCluster, unread: Unread) -> None:
    worker = faulty.serving("--slow-client-timeout", "1")
    unread(1)
    outcome = 'dynamo_worker_requests_total{outcome="slow_client"}'
    eventually(lambda: worker.metric(outcome) == 1, 60, "it was given up")
    assert "the client has not read for 1 s" in worker.log
    assert worker.metric("dynamo_worker_in_flight") == 0
    assert faulty.cluster.ask().ok
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_a_client_that_does_not_read_does_not_keep_the_worker_from_leaving(
    faulty: FaultyCluster, unread: Unread
) -> None:
    worker = faulty.serving("--drain", "handoff")
    unread(1)
    eventually(lambda: worker.metric("dynamo_worker_slow_clients") == 1, 60, "it is slow")
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone(10) == 0
