"""The probes, and the way through to a real little server behind them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import threading

import pytest
import uvloop
from aio import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_worker.engine import LargeOperation
from dynamo_worker.errors import StartError
from dynamo_worker.host.status import status_server
from dynamo_worker.host.status.control_routes import ControlAccess
from dynamo_worker.host.status.scrape import Scrape
from dynamo_worker.host.status.status_server import StatusServer
from dynamo_worker.lifecycle import State


class Upstream:
    """The runtime's status server as far as it matters: answers every request with what it received."""

    def __init__(self, body=None):
        self.body = body
        self.heads = []
        self.server = None
        self.tasks = set()

    async def start(self):
        async def serve(reader, writer):
            self.tasks.add(asyncio.current_task())
            await self._serve(reader, writer)

        self.server = await asyncio.start_server(serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        received = await reader.readexactly(length)
        body = received or self.body or head.split(b" ")[1]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nx-from: runtime\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()


class Worker:
    """A status server, and a client that speaks raw bytes."""

    def __init__(self):
        self.state = State.STARTING
        self.problem = None
        self.server = StatusServer(
            lambda: self.state, live_path="/live", health_path="/health", problem=lambda: self.problem
        )
        self.port = 0

    async def send(self, data, *, finish=False):
        """Send bytes and return everything that comes back until the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        if finish:
            writer.write_eof()
        try:
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()

    async def get(self, path, *headers):
        """Make one request and return status, headers and body."""
        lines = [f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]
        answer = await self.send("\r\n".join(lines).encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *rest = head.decode().split("\r\n")
        return int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in rest)}, body


class Door:
    """The supervisor at the door: takes the sockets, and passes connections on."""

    def __init__(self, takes=True):
        self.takes = takes
        self.listener = self.end = self.path = None

    def __call__(self, listener, end, path):
        if self.takes:
            self.listener, self.end = (socket.socket(fileno=os.dup(descriptor)) for descriptor in (listener, end))
            self.path = path
        return self.takes

    def pass_on(self, data):
        """Accept a connection that is waiting, and pass it on with some data."""
        with self.listener.accept()[0] as connection:
            socket.send_fds(self.end, [data], [connection.fileno()])

    def close(self):
        self.listener.close()
        self.end.close()


@contextlib.asynccontextmanager
async def worker(upstream=None):
    served = Worker()
    served.port = await served.server.start("127.0.0.1", 0)
    if upstream is not None:
        served.server.forward_to("0.0.0.0", await upstream.start())
    try:
        yield served
    finally:
        served.server.close()
        if upstream is not None:
            upstream.server.close()
            # Those that the end of the event loop would cancel leave an open socket to the next test.
            await until(lambda: all(task.done() for task in upstream.tasks))


async def nothing(body):
    return body


def post(path, body=b"{}", *headers, length=None, method="POST"):
    """Return a request as a well-behaved client of the control routes makes it; headers come first."""
    lines = [
        f"{method} {path} HTTP/1.1",
        *headers,
        *(() if any(line.lower().startswith("host:") for line in headers) else ("host: localhost",)),
        *(() if any(line.lower().startswith("content-type:") for line in headers) else (JSON,)),
        f"content-length: {len(body) if length is None else length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


JSON = "content-type: application/json"


# ------------------------------------------------------------------------------------------------------------ probes


def test_alive_in_every_state_ready_only_while_it_serves():
    async def main():
        async with worker(Upstream(b"runtime")) as served:
            for state in State:
                served.state = state
                live, _, body = await served.get("/live")
                assert live == 200
                assert json.loads(body) == {"status": "live", "state": state.value}
                ready, headers, body = await served.get("/health")
                if state is State.SERVING:
                    assert (ready, headers["x-from"], body) == (200, "runtime", b"runtime")
                else:
                    assert ready == 503
                    assert json.loads(body) == {"status": "notready", "state": state.value}

    asyncio.run(main())


def test_a_worker_with_a_problem_is_alive_but_not_ready():
    async def main():
        async with worker(Upstream(b"runtime")) as served:
            served.state, served.problem = State.SERVING, "out of discovery"
            assert (await served.get("/live"))[0] == 200
            ready, _, body = await served.get("/health")
            assert ready == 503
            assert json.loads(body) == {"status": "notready", "state": "SERVING", "reason": "out of discovery"}

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/live?verbose=1", "/live?"])
def test_a_query_does_not_matter(path):
    async def main():
        async with worker() as served:
            assert (await served.get(path))[0] == 200

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/livez", "/live/x", "//live", "/LIVE"])
def test_another_path_is_not_the_probe(path):
    async def main():
        async with worker() as served:
            assert (await served.get(path))[0] == 503

    asyncio.run(main())


def test_before_the_runtime_is_there_only_the_probe_answers():
    async def main():
        async with worker() as served:
            assert (await served.get("/live"))[0] == 200
            assert (await served.get("/metrics"))[0] == 503

    asyncio.run(main())


def test_answers_say_that_the_connection_ends_and_it_does():
    """A prober with keep-alive must not be stuck with a connection on which its next probe is answered by others."""

    async def main():
        async with worker() as served:
            # Returns only because the server closes; two requests on one connection get one answer.
            answer = await served.send(b"GET /live HTTP/1.1\r\nconnection: keep-alive\r\n\r\n" * 2)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert b"connection: close\r\n" in answer
            length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
            assert len(answer.partition(b"\r\n\r\n")[2]) == length

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------------- forwarding


def test_everything_else_goes_to_the_runtime():
    async def main():
        upstream = Upstream()
        async with worker(upstream) as served:
            status, headers, body = await served.get("/metrics?name[]=up", "accept: text/plain")
            assert (status, headers["x-from"], body) == (200, "runtime", b"/metrics?name[]=up")
            assert b"accept: text/plain\r\n" in upstream.heads[0]

    asyncio.run(main())


@pytest.mark.parametrize("header", ["Connection: keep-alive", "connection:upgrade", "CONNECTION: keep-alive"])
def test_the_runtime_is_asked_to_close(header):
    async def main():
        upstream = Upstream()
        async with worker(upstream) as served:
            assert (await served.get("/metrics", header))[0] == 200
            lines = [line.lower() for line in upstream.heads[0].split(b"\r\n")]
            assert [line for line in lines if line.startswith(b"connection")] == [b"connection: close"]

    asyncio.run(main())


def test_a_large_answer_goes_through():
    body = bytes(range(256)) * 4096  # 1 MiB: more than any buffer on the way

    async def main():
        async with worker(Upstream(body)) as served:
            answer = await served.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert answer.partition(b"\r\n\r\n")[2] == body

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}", 405),
        (b"DELETE /v1/loras/x HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}", 400),
        (b"GET /metrics HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        # The runtime takes a single LF for the end of a line.
        (b"GET /metrics HTTP/1.1\r\nhost: x\n\nPOST /other HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\nhost: x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nhost: x\ry: z\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nhost: x\0\r\n\r\n", 400),
    ],
)
def test_nothing_is_written_to_the_runtime(request_, status):
    async def main():
        upstream = Upstream()
        async with worker(upstream) as served:
            assert (await served.send(request_)).startswith(b"HTTP/1.1 %d " % status)
            assert not upstream.heads

    asyncio.run(main())


def test_a_runtime_that_takes_no_connections_is_given_up(monkeypatch):
    monkeypatch.setattr(status_server, "_IDLE_TIMEOUT", 0.1)

    async def main():
        # A queue of one that is full: what connects then waits.
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as waiting:
            for _ in range(8):
                client = waiting.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            async with worker(Upstream()) as served:
                served.server.forward_to(*full.getsockname())
                answer = await asyncio.wait_for(served.send(b"GET /metrics HTTP/1.1\r\n\r\n"), 10)
                assert answer.startswith(b"HTTP/1.1 504 ")

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_are_rendered_before_the_runtime_is_asked():
    rendered = []

    async def main():
        async with worker(Upstream()) as served:
            served.server.serve_metrics(Scrape(lambda: rendered.append(threading.current_thread()) or "a 1\n"))
            assert (await served.get("/metrics"))[0] == 200
            assert (await served.get("/metadata"))[0] == 200

    asyncio.run(main())
    assert len(rendered) == 1
    assert rendered[0] is not threading.main_thread()


def test_probes_answer_while_metrics_hang():
    release = threading.Event()

    async def main():
        async with worker(Upstream()) as served:
            served.server.serve_metrics(Scrape(lambda: release.wait(20) and "", patience=0.2))
            scrape = asyncio.ensure_future(served.get("/metrics"))
            assert (await served.get("/live"))[0] == 200
            assert (await scrape)[0] == 504
            release.set()

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------- control routes


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/engine/x", b'{"a": 1}'), 200),
        (post("/engine/x?y=z", b""), 200),
        (post("/engine/y"), 404),
        (b"GET /engine/x HTTP/1.1\r\nhost: evil.example\r\norigin: http://evil.example\r\n\r\n", 405),
        (post("/engine/x", b"{}", "host: evil.example"), 403),
        (post("/engine/x", b"{}", "origin: http://evil.example"), 403),
        (post("/engine/x", b"{}", "content-type: text/plain"), 415),
        (post("/engine/x", length=64 * 1024 + 1), 413),
        (post("/engine/x", length=10**40), 400),
        (post("/engine/x", length=-1), 400),
        (post("/engine/x", b"{}", "content-length: 1"), 400),
        (post("/engine/x", b"0\r\n\r\n", "transfer-encoding: chunked"), 411),
    ],
)
def test_control_routes_are_ours_alone(request_, status):
    called = []

    async def operation(body):
        called.append(body)
        return {"got": body}

    async def main():
        upstream = Upstream(b"the runtime")
        async with worker(upstream) as served:
            assert (await served.send(request_)).startswith(b"HTTP/1.1 503 "), "the engine is not there yet"
            served.server.serve_routes({"x": operation})
            answer = await served.send(request_)
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer
            assert called == ([] if status != 200 else [json.loads(answer.partition(b"\r\n\r\n")[2])["got"]])
            served.server.stop_routes()
            assert (await served.send(request_)).startswith(b"HTTP/1.1 503 "), "it is about to go"
            assert not upstream.heads

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/engine/large", b" " * 100_000 + b"{}"), 200),
        (post("/engine/large", length=150_001), 413),
        (post("/engine/x", length=100_000), 413),
        (post("/engine/none", length=100_000), 413),
        (post("/engine/large", b"", "origin: http://evil.example", length=100_000), 403),
    ],
)
def test_bodies_are_as_large_as_their_operation_takes(request_, status):
    async def main():
        async with worker() as served:
            served.server.serve_routes({"large": LargeOperation(nothing, 150_000), "x": nothing})
            assert (await served.send(request_)).startswith(b"HTTP/1.1 %d " % status)

    asyncio.run(main())


def test_a_large_body_may_also_come_under_the_peers_name():
    async def main():
        async with worker() as served:
            served.server.serve_routes({"large": LargeOperation(nothing, 150_000)})
            answer = await served.send(post("/engine/control/large", b" " * 100_000 + b"{}"))
            assert not answer.startswith(b"HTTP/1.1 413 ")

    asyncio.run(main())


def test_few_large_bodies_are_read_at_once(monkeypatch):
    monkeypatch.setattr(status_server, "_BODY_TIMEOUT", 60.0)
    request_ = post("/engine/large", b" " * 100_000 + b"{}")

    async def main():
        async with worker() as served:
            served.server.serve_routes({"large": LargeOperation(nothing, 150_000), "x": nothing})
            clients = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(4)]
            for _, writer in clients:
                writer.write(request_[:-1])
            await until(lambda: served.server._large_bodies == len(clients))
            one_more = post("/engine/large", length=100_000)
            assert (await served.send(one_more)).startswith(b"HTTP/1.1 503 ")
            assert (await served.send(post("/engine/x"))).startswith(b"HTTP/1.1 200 ")
            for reader, writer in clients:
                writer.write(request_[-1:])
                assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
                writer.close()
            assert (await served.send(request_)).startswith(b"HTTP/1.1 200 ")

    asyncio.run(main())


def test_a_token_guards_the_control_routes_and_nothing_else():
    async def main():
        async with worker(Upstream(b"metrics")) as served:
            served.server._access = ControlAccess("secret")
            served.server.serve_routes({"x": nothing})
            assert (await served.send(post("/engine/x"))).startswith(b"HTTP/1.1 401 ")
            assert (await served.send(post("/engine/x", b"{}", "authorization: Bearer secret"))).startswith(
                b"HTTP/1.1 200 "
            )
            for path in ("/live", "/metrics"):
                assert (await served.get(path))[0] == 200

    asyncio.run(main())


def test_a_runtime_that_is_gone_is_not_ready():
    """Its server closes when its shutdown starts; the worker still lives and drains."""

    async def main():
        upstream = Upstream()
        async with worker(upstream) as served:
            served.state = State.SERVING
            assert (await served.get("/health"))[0] == 200
            upstream.server.close()
            await upstream.server.wait_closed()
            assert (await served.get("/health"))[0] == 503
            assert (await served.get("/metrics"))[0] == 503
            assert (await served.get("/live"))[0] == 200

    asyncio.run(main())


def test_a_runtime_that_dies_in_the_middle_of_an_answer():
    async def main():
        upstream = Upstream()

        async def die(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
            await writer.drain()
            writer.transport.abort()

        upstream._serve = die
        async with worker(upstream) as served:
            answer = await served.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert answer.endswith(b"content-length: 100\r\n\r\nhalf"), "the client can see that it is torn"
            assert (await served.get("/live"))[0] == 200

    asyncio.run(main())


# ----------------------------------------------------------------------------------------------------- rude clients


@pytest.mark.parametrize(
    "data",
    [b"\r\n\r\n", b"garbage\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40 + b"\r\n\r\n"],
    ids=["empty", "one word", "TLS"],
)
def test_what_is_no_request_is_refused(data):
    async def main():
        async with worker(Upstream()) as served:
            answer = await served.send(data)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert (await served.get("/live"))[0] == 200

    asyncio.run(main())


def test_a_head_that_never_ends_is_refused():
    async def main():
        async with worker() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(b"x-padding: " + b"x" * 1000 + b"\r\n")
                    await writer.drain()
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = await asyncio.wait_for(reader.read(), 5)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
            writer.close()
            assert (await served.get("/live"))[0] == 200

    asyncio.run(main())


def test_an_oversized_head_that_is_sent_at_once_gets_an_answer():
    async def main():
        async with worker() as served:
            answer = await served.send(b"GET /live HTTP/1.1\r\nx: " + b"x" * 20_000 + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert (await served.get("/live", "x: " + "x" * 10_000))[0] == 200, "an ordinary cookie is no problem"

    asyncio.run(main())


def test_a_client_that_says_nothing_is_sent_away(monkeypatch):
    monkeypatch.setattr(status_server, "_HEAD_TIMEOUT", 0.05)

    async def main():
        async with worker() as served:
            assert (await served.send(b"GET /live HTT")).startswith(b"HTTP/1.1 400 ")

    asyncio.run(main())


def test_a_slow_client_does_not_keep_others_waiting():
    async def main():
        async with worker() as served:
            writers = [(await asyncio.open_connection("127.0.0.1", served.port))[1] for _ in range(50)]
            assert (await asyncio.wait_for(served.get("/live"), 2))[0] == 200
            for writer in writers:
                writer.close()

    asyncio.run(main())


def test_clients_that_never_ask_are_ended_for_those_that_do(monkeypatch):
    """However many there are, they neither keep a probe from its answer nor use up the descriptors."""
    monkeypatch.setattr(status_server, "_MOST_CONNECTIONS", 8)

    async def main():
        async with worker() as served:
            silent = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(20)]
            assert (await asyncio.wait_for(served.get("/live"), 2))[0] == 200
            await until(lambda: sum(reader.at_eof() or reader.exception() is not None for reader, _ in silent) >= 12)
            await leave(served, silent)

    asyncio.run(main())


def test_who_is_being_answered_is_ended_last(monkeypatch):
    monkeypatch.setattr(status_server, "_MOST_CONNECTIONS", 3)

    async def main():
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(body):
            begun.set()
            await go_on.wait()
            return {"done": True}

        async with worker(Upstream()) as served:
            served.server.serve_routes({"slow": slow})
            asking = await asyncio.open_connection("127.0.0.1", served.port)
            asking[1].write(post("/engine/slow"))
            await begun.wait()
            silent = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(10)]
            assert (await asyncio.wait_for(served.get("/live"), 2))[0] == 200
            go_on.set()
            assert (await asyncio.wait_for(asking[0].read(), 2)).endswith(b'{"done": true}')
            await leave(served, [*silent, asking])

    asyncio.run(main())


@pytest.mark.parametrize("where", ["body", "answer"])
def test_a_probe_has_time_to_ask_among_clients_that_stall_later(monkeypatch, where):
    """It was the only one that had not asked for anything, and ended for the next of them."""
    monkeypatch.setattr(status_server, "_MOST_CONNECTIONS", 8)

    async def main():
        enough = asyncio.Event()

        async def slow(body):
            await enough.wait()
            return {}

        async with worker(Upstream()) as served:
            served.server.serve_routes({"slow": slow})
            request = post("/engine/slow")

            async def stall():
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(request[:-1] if where == "body" else request)
                return reader, writer

            stalling = [await stall() for _ in range(12)]
            await asyncio.sleep(0.05)
            reader, writer = probe = await asyncio.open_connection("127.0.0.1", served.port)
            await asyncio.sleep(0.05)
            stalling += [await stall() for _ in range(3)]
            await asyncio.sleep(0.05)
            writer.write(b"GET /live HTTP/1.1\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 2)).startswith(b"HTTP/1.1 200 ")
            enough.set()
            await leave(served, [*stalling, probe])

    asyncio.run(main())


def test_who_asks_at_once_is_answered_however_many_come_with_it(monkeypatch):
    """A loop that has had no core for a while finds them all at the same time."""
    monkeypatch.setattr(status_server, "_MOST_CONNECTIONS", 8)

    async def main():
        async with worker() as served:
            # Blocking: until the last of them has connected, the loop does nothing.
            connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
            connections[0].sendall(b"GET /live HTTP/1.1\r\n\r\n")
            answer = await asyncio.to_thread(connections[0].recv, 4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
            for connection in connections:
                connection.close()
            await leave(served, [])

    asyncio.run(main())


def test_a_client_that_leaves_as_its_place_is_needed_leaves_no_traceback():
    """Up to Python 3.11 `wait_for` loses what is raised while it is cancelled, and asyncio logs it."""
    troubles = []

    class Leaving:
        def is_closing(self):
            return False

        def write(self, data):
            pass

        async def drain(self):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ConnectionResetError("Connection lost") from None

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context["message"]))
        task = asyncio.ensure_future(asyncio.wait_for(status_server._copy(b"x", asyncio.StreamReader(), Leaving()), 9))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})
        del task
        gc.collect()

    asyncio.run(main())
    assert troubles == []


async def leave(served, connections):
    """Close connections and wait until the server has done so, too."""
    for _, writer in connections:
        writer.close()
    await until(lambda: not served.server._silent and not served.server._answered)
    await asyncio.sleep(0.01)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def reset(writer):
    """Close with a reset, as a prober does that has run out of time."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("loop", [asyncio, uvloop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("leaving", ["closes", "resets", "shuts down", "stays"])
@pytest.mark.parametrize("path", ["/engine/x", "/metrics"])
def test_a_client_that_leaves_in_the_middle_of_a_body_takes_its_descriptors_along(monkeypatch, loop, leaving, path):
    monkeypatch.setattr(status_server, "_BODY_TIMEOUT", 0.1, raising=False)

    async def main():
        async with worker(Upstream()) as served:
            served.server.serve_routes({"x": nothing})
            assert (await served.get("/live"))[0] == 200
            await settled(served)
            before = descriptors()
            staying = []
            for _ in range(10):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(post(path, b"half of it", length=1000))
                await writer.drain()
                if leaving == "closes":
                    writer.close()
                elif leaving == "resets":
                    reset(writer)
                elif leaving == "shuts down":
                    writer.write_eof()
                if leaving in ("shuts down", "stays"):
                    staying.append((reader, writer))
            for reader, writer in staying:
                with contextlib.suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), 5)
                writer.close()
            await until(lambda: descriptors() <= before)

    loop.run(main())


async def settled(served):
    """Wait until the server has let go of all connections."""
    await until(lambda: not served.server._silent and not served.server._answered)
    await asyncio.sleep(0.05)


def test_a_client_that_does_not_read_its_answer_is_sent_away(monkeypatch):
    monkeypatch.setattr(status_server, "_IDLE_TIMEOUT", 0.1, raising=False)

    async def main():
        async with worker(Upstream(b"x" * 64 * 1024 * 1024)) as served:
            assert (await served.get("/live"))[0] == 200
            await settled(served)
            before = descriptors()
            client = socket.create_connection(("127.0.0.1", served.port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            await until(lambda: served.server._answered)
            await settled(served)
            client.close()
            await until(lambda: descriptors() <= before)

    asyncio.run(main())


@pytest.mark.parametrize("limit", ["_IDLE_TIMEOUT", "_TOTAL_TIMEOUT"])
def test_a_runtime_that_never_ends_its_answer(monkeypatch, limit):
    """Neither one that says nothing nor one that goes on and on keeps a connection for ever."""
    monkeypatch.setattr(status_server, limit, 0.2, raising=False)

    async def main():
        upstream = Upstream()

        async def hang(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while limit == "_TOTAL_TIMEOUT":
                    writer.write(b"more and ")
                    await writer.drain()
                    await asyncio.sleep(0.01)
                await reader.read()
            writer.close()

        upstream._serve = hang
        async with worker(upstream) as served:
            try:
                answer = await served.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            except ConnectionError:
                answer = b"torn"
            assert answer == b"torn" or answer.startswith((b"HTTP/1.1 504 ", b"more and "))
            await settled(served)

    asyncio.run(main())


@pytest.mark.parametrize("loop", [asyncio, uvloop], ids=["asyncio", "uvloop"])  # the worker has uvloop
def test_a_client_that_goes_away_is_no_error(caplog, loop):
    async def main():
        async with worker(Upstream()) as served:
            for data in (b"", b"GET", b"GET /metrics HTTP/1.1\r\n\r\n", b"GET /live HTTP/1.1\r\n\r\n"):
                _, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(data)
                await writer.drain()
                reset(writer)
            await asyncio.sleep(0.05)
            assert (await served.get("/live"))[0] == 200

    loop.run(main())
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_no_bytes_take_the_server_down(data):
    async def main():
        async with worker(Upstream(b"ok")) as served:
            with contextlib.suppress(ConnectionError):
                answer = await served.send(data, finish=True)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
            assert (await served.get("/live"))[0] == 200

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------------------- door


@pytest.mark.parametrize("loop", [asyncio, uvloop], ids=["asyncio", "uvloop"])
def test_connections_come_through_the_door(loop):
    """With all the limits of those that it accepts itself."""

    async def main():
        served, door, upstream = Worker(), Door(), Upstream()
        served.port = await served.server.start("127.0.0.1", 0, door)
        served.server.forward_to("127.0.0.1", await upstream.start())
        served.server.serve_routes({"x": nothing})
        assert door.path == "/live"
        assert door.listener.getsockname()[1] == served.port
        before = descriptors()
        for data, rest, expected in [
            (b"GET /live HTTP/1.1\r\n\r\n", b"", b"HTTP/1.1 200 "),
            (b"GET /metrics HTTP/1.1\r\n", b"\r\n", b"HTTP/1.1 200 "),
            (post("/engine/x")[:-1], b"}", b"HTTP/1.1 200 "),
            (post("/engine/x", length=100_000), b"", b"HTTP/1.1 413 "),
            (b"GET /live HTTP/1.1\r\nx: " + b"x" * (16 * 1024 - 23), b"xxxx", b"HTTP/1.1 400 "),
            (b"\r\n\r\n", b"", b"HTTP/1.1 400 "),
        ]:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            door.pass_on(data)
            writer.write(rest)
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(expected), data[:40]
            writer.close()
        await settled(served)
        await until(lambda: descriptors() <= before)
        served.server.close()
        assert door.end.recv(1) == b"", "the supervisor sees that the door closes"
        door.close()
        upstream.server.close()

    loop.run(main())


def test_a_supervisor_that_does_not_take_the_socket():
    async def main():
        served = Worker()
        served.port = await served.server.start("127.0.0.1", 0, Door(takes=False))
        assert (await served.get("/live"))[0] == 200
        served.server.close()

    asyncio.run(main())


def test_a_door_that_the_supervisor_closes_is_not_watched_any_more():
    async def main():
        served, door = Worker(), Door()
        await served.server.start("127.0.0.1", 0, door)
        door.close()
        await asyncio.sleep(0.05)
        assert not asyncio.get_running_loop().remove_reader(served.server._door.fileno())
        served.server.close()

    asyncio.run(main())


# --------------------------------------------------------------------------------------------------------- addresses


def test_a_port_in_use_says_so():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(StartError, match=f"127.0.0.1:{port} is in use") as raised:
                await StatusServer(lambda: State.STARTING, live_path="/live", health_path="/health").start(
                    "127.0.0.1", port
                )
            assert "--system-port" in raised.value.hint

    asyncio.run(main())


def test_a_host_that_is_not_ours_says_so():
    async def main():
        server = StatusServer(lambda: State.STARTING, live_path="/live", health_path="/health")
        with pytest.raises(StartError, match=r"192\.0\.2\.1:0 cannot be used: Cannot assign requested address"):
            await server.start("192.0.2.1", 0)

    asyncio.run(main())


def test_an_address_of_ipv6():
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 here")

    async def main():
        server = StatusServer(lambda: State.STARTING, live_path="/live", health_path="/health")
        port = await server.start("::1", 0)
        _, writer = await asyncio.open_connection("::1", port)
        writer.close()
        server.close()

    asyncio.run(main())


def test_listening_takes_no_thread():
    """Where there are no more of them, libuv ends the process."""
    script = """if True:
        import os, uvloop
        from dynamo_worker.lifecycle import State
        from dynamo_worker.host.status.status_server import StatusServer
        server = StatusServer(lambda: State.STARTING, live_path="/live", health_path="/health")
        before = os.listdir("/proc/self/task")
        uvloop.run(server.start("127.0.0.1", 0))
        assert os.listdir("/proc/self/task") == before
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_close_frees_the_port():
    async def main():
        async with worker() as served:
            served.server.close()
            await asyncio.sleep(0)
            with socket.create_server(("127.0.0.1", served.port)):
                pass
        StatusServer(lambda: State.STARTING, live_path="/live", health_path="/health").close()

    asyncio.run(main())
