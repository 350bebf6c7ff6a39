"""What reaches routers: load and KV events, through Dynamo's own publishers and a discovery directory."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dynamo_worker.kit import publishing
from dynamo_worker.kit.publishing import KvEvents, LoadPoller, LoadPublisher, RankLoad

_PUBLISH = """
import asyncio, json, os, sys
from dynamo.runtime import DistributedRuntime
from dynamo_worker.kit.publishing import KvEvents, LoadPublisher, publish_kv_events

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("test.backend.generate")
    load = LoadPublisher()
    load.publish(0, 5)
    await load.attach(endpoint, [0, 1])
    load.publish(1, 6)
    sources = {int(rank): source for rank, source in json.loads(sys.argv[1]).items()}
    publishers = publish_kv_events(endpoint, KvEvents(sources, "kv", 16))
    print(len(publishers), flush=True)
    sys.stdin.read()
    os._exit(0)

asyncio.run(main())
"""


def greeted(listener: socket.socket) -> bool:
    """Return whether a ZMQ subscriber connects: its greeting begins with the byte 255."""
    listener.settimeout(20)
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(20)
        return connection.recv(1) == b"\xff"


def test_dynamos_own_publishers_are_announced_and_read_every_rank(tmp_path: Path) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    listeners.append(socket.socket(socket.AF_UNIX))
    path = tmp_path / "events"
    listeners[2].bind(str(path))
    listeners[2].listen()
    first, second = (listener.getsockname()[1] for listener in listeners[:2])
    sources = f'{{"0": "tcp://*:{first}", "1": "tcp://0.0.0.0:{second}", "2": "ipc://{path}"}}'
    hosts = dict.fromkeys(("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"), "127.0.0.1")
    environment = {**os.environ, **hosts, "DYN_FILE_KV": str(tmp_path / "discovery"), "DYN_SYSTEM_PORT": "-1"}
    with subprocess.Popen(
        [sys.executable, "-c", _PUBLISH, sources], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"3\n"
            for listener in listeners:
                with listener:
                    assert greeted(listener)
            found = {urllib.parse.unquote(path.name) for path in tmp_path.rglob("event_channels/*")}
            topics = {name.partition("/topic/")[2].partition("/")[0] for name in found}
            assert topics == {"kv_metrics", "kv-events"}
        finally:
            process.kill()


class FakePublisher:
    """Notes what is published; the real one hands it to the runtime's event plane, which tells nobody about it."""

    published: list[tuple[int, int]]

    def __init__(self) -> None:
        self.published = []

    async def create_endpoint(self, endpoint: Any) -> None:
        self.endpoint = endpoint

    def publish(self, rank: int, *, kv_used_blocks: int) -> None:
        self.published.append((rank, kv_used_blocks))


def test_only_changes_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePublisher()
    monkeypatch.setattr(publishing, "WorkerMetricsPublisher", lambda: fake)
    load = LoadPublisher()
    load.publish(0, 5)  # the engine may report before a router can listen
    assert load.held_blocks() == 5
    endpoint: Any = object()
    asyncio.run(load.attach(endpoint, [0, 1]))
    assert fake.endpoint is endpoint
    assert fake.published == [(0, 5), (1, 0)], "routers learn of every rank at once"
    for rank, used in ((0, 5), (1, 3), (1, 3), (0, 0)):
        load.publish(rank, used)
    assert fake.published[2:] == [(1, 3), (0, 0)]
    assert load.held_blocks() == 3


def test_a_wildcard_stands_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(publishing, "KvEventPublisher", lambda **options: made.append(options) or options)
    endpoint: Any = object()
    sources = {0: "tcp://*:1", 1: "tcp://0.0.0.0:2", 3: "ipc:///x/kv", 4: "tcp://192.0.2.1:3"}
    publishers: Any = publishing.publish_kv_events(endpoint, KvEvents(sources, "topic", 32))
    assert publishers == made
    addresses = {options["dp_rank"]: options["zmq_endpoint"] for options in made}
    assert addresses == {0: "tcp://127.0.0.1:1", 1: "tcp://127.0.0.1:2", 3: "ipc:///x/kv", 4: "tcp://192.0.2.1:3"}
    for options in made:
        assert options["endpoint"] is endpoint
        assert (options["kv_block_size"], options["zmq_topic"], options["enable_local_indexer"]) == (32, "topic", True)


def test_load_that_an_engine_is_asked_for() -> None:
    class Publisher:
        published: ClassVar[list[tuple[int, int]]] = []

        def publish(self, rank: int, blocks: int) -> None:
            self.published.append((rank, blocks))

    async def check() -> None:
        publisher: Any = Publisher()
        news = [[RankLoad(0, 2, 5)], [], [RankLoad(1, 4, None), RankLoad(0, 1, 6)]]
        poller = LoadPoller(lambda: news.pop(0) if news else [], lambda load: load, publisher, "toy-load")
        while poller.steps < 3:
            await asyncio.sleep(0.01)
        assert poller.requests() == 5
        assert publisher.published == [(0, 5), (0, 6)]
        poller.stop()

    asyncio.run(asyncio.wait_for(check(), 10))
