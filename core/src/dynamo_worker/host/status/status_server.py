"""The worker's status server: probes, control routes, and a proxy for the runtime's status server.

The runtime answers ``/live`` and ``/health`` with one handler (measured on 1.6.1), so the kubelet would restart a
worker that is merely not ready, and it closes its server at the start of its shutdown. This server owns the configured
port. It answers ``/live`` as long as the worker lives, ``/health`` while the worker does not serve or is out of
discovery, and the control routes, which the runtime would serve to any client with any method. It forwards all other
requests to the runtime's server on another port.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from dynamo_worker.errors import StartError
from dynamo_worker.host.status import http_message
from dynamo_worker.host.status.control_routes import ControlAccess, ControlRoutes
from dynamo_worker.host.status.http_message import HttpError, RequestHead
from dynamo_worker.lifecycle import State
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.channel import receive_with_descriptors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from dynamo_worker.engine import Operation
    from dynamo_worker.host.status.scrape import Scrape

log = get_logger(__name__)

#: Prefix of the control routes.
_CONTROL = "/engine/"
#: Path of the metrics on the runtime's status server.
_METRICS = "/metrics"
#: Largest request head in bytes.
_MAX_HEAD = 16 * 1024
#: Largest body of a control request in bytes, unless it is for a ``LargeOperation``: nearly all
#: hold a few names and numbers.
_MAX_BODY = 64 * 1024
#: Most larger bodies that are read at once.
_MOST_LARGE_BODIES = 4
#: Seconds for a client to send its request head.
_HEAD_TIMEOUT = 10.0
#: Seconds for a client to send the body.
_BODY_TIMEOUT = 10.0
#: Seconds that the runtime may be silent, or a client may not read.
_IDLE_TIMEOUT = 20.0
#: Seconds to forward a whole answer of the runtime.
_TOTAL_TIMEOUT = 60.0
#: Most connections at once. One more closes the oldest connection among those without a request yet, or among those
#: being answered, whichever are more: clients that never finish must not exhaust the descriptors that requests need, or
#: keep a probe from its answer.
_MOST_CONNECTIONS = 64
#: Turns of the event loop before a connection has to make room: those accepted together may have sent their requests
#: already and are answered first, even if the loop had no processor for a while and finds hundreds of them.
_TURNS_TO_ASK = 3
#: Connections waiting to be accepted. The kernel drops those beyond, and their clients retry after a second.
_BACKLOG = 256
_COPY_CHUNK = 64 * 1024

#: Offers the listening socket, our end of a pair for the connections and the path of the liveness probe to the
#: supervisor; returns whether it takes them.
HandOver = Callable[[int, int, str], bool]


class StatusServer:
    """Serves the probes and the control routes, and forwards everything else to the runtime's status server."""

    def __init__(
        self,
        state: Callable[[], State],
        *,
        live_path: str,
        health_path: str,
        problem: Callable[[], str | None] = lambda: None,
        access: ControlAccess | None = None,
    ) -> None:
        """Answer probes from ``state()``.

        :param problem: returns why a serving worker is not ready; None if it is.
        :param live_path: path of the liveness probe (``DYN_SYSTEM_LIVE_PATH``).
        :param health_path: path of the readiness probe (``DYN_SYSTEM_HEALTH_PATH``).
        :param access: decides who may call the control routes.
        """
        self._state = state
        self._problem = problem
        self._live_path = live_path
        self._health_path = health_path
        self._access = access or ControlAccess()
        self._server: asyncio.Server | None = None
        self._door: socket.socket | None = None
        self._adopting: set[asyncio.Task[None]] = set()
        self._upstream: tuple[str, int] | None = None
        self._control: ControlRoutes | None = None
        self._large_bodies = 0
        self._scrape: Scrape | None = None
        # In order of arrival: connections that have not sent a whole request yet, and those being answered.
        self._silent: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._answered: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self, host: str, port: int, hand_over: HandOver | None = None) -> int:
        """Listen, and return the port (a free one if ``port`` is 0).

        :param hand_over: offers the listening socket to the supervisor, which then answers the liveness probe.
        :raises StartError: the address cannot be used.
        """
        try:
            # uvloop would look up even a numeric host, in threads, and abort if it gets none: create the socket here.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
            listener.listen(_BACKLOG)
            actual: int = listener.getsockname()[1]
            if hand_over is None or not self._enter_by_door(listener, hand_over):
                self._server = await asyncio.start_server(self._serve, sock=listener, limit=_MAX_HEAD, backlog=_BACKLOG)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise StartError(
                f"the status server's address {host}:{port} {why}",
                hint="choose another with --system-port (DYN_SYSTEM_PORT), or -1 for none",
            ) from error
        return actual

    def _enter_by_door(self, listener: socket.socket, hand_over: HandOver) -> bool:
        """Have the supervisor accept the connections; return False if it does not take the listening socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if not hand_over(listener.fileno(), theirs.fileno(), self._live_path):
                ours.close()
                return False
        listener.close()
        ours.setblocking(False)
        self._door = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._take_connections, ours)
        return True

    def _take_connections(self, door: socket.socket) -> None:
        """Serve the connections that the supervisor has passed on."""
        for _ in range(_MOST_CONNECTIONS):
            try:
                data, descriptors = receive_with_descriptors(door, _MAX_HEAD, 1)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:  # the supervisor is gone, and the guardian ends this process
                asyncio.get_running_loop().remove_reader(door.fileno())
                return
            # None if no descriptor was free: the client sees that its connection is closed.
            for descriptor in descriptors:
                task = asyncio.ensure_future(self._adopt(socket.socket(fileno=descriptor), data))
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)

    async def _adopt(self, connection: socket.socket, data: bytes) -> None:
        """Serve an accepted connection, of which some data has been read already."""
        reader = asyncio.StreamReader(limit=_MAX_HEAD)
        reader.feed_data(data)
        protocol = asyncio.StreamReaderProtocol(reader, self._serve)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:
            connection.close()
            log.debug("Status connection lost", error=error)

    def forward_to(self, host: str, port: int) -> None:
        """Forward requests to the runtime's status server from now on."""
        anywhere = host in ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound
        self._upstream = ("127.0.0.1" if anywhere else host, port)

    def serve_routes(self, routes: Mapping[str, Operation]) -> None:
        """Serve these control routes from now on."""
        self._control = ControlRoutes(routes, self._access)

    def serve_metrics(self, scrape: Scrape) -> None:
        """Render these metrics before the runtime is asked for them, from now on."""
        self._scrape = scrape

    def stop_routes(self) -> None:
        """Stop serving control routes: the engine is about to end. Running operations continue."""
        self._control = None

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        if self._door is not None:
            asyncio.get_running_loop().remove_reader(self._door.fileno())
            with contextlib.suppress(OSError):
                self._door.shutdown(socket.SHUT_RDWR)  # a forked process may have inherited it
            self._door.close()
            self._door = None
        if self._scrape is not None:
            self._scrape.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._silent[task] = writer
        try:
            await self._make_room()
            await self._converse(task, reader, writer)
        except asyncio.CancelledError:  # its place was needed; nothing awaits this task
            pass
        except OSError as error:
            log.debug("Status connection lost", error=error)
        finally:
            await _end(writer)
            self._silent.pop(task, None)
            self._answered.pop(task, None)

    async def _make_room(self) -> None:
        """Close a connection if there are too many."""
        if len(self._silent) + len(self._answered) <= _MOST_CONNECTIONS:
            return
        for _ in range(_TURNS_TO_ASK):
            await asyncio.sleep(0)
        if len(self._silent) + len(self._answered) > _MOST_CONNECTIONS:
            # From the larger group: otherwise the only candidate could be a probe that has just connected, once the
            # others have requested something slow.
            crowd = max(self._silent, self._answered, key=len)
            oldest = next(iter(crowd))
            crowd.pop(oldest).transport.abort()
            oldest.cancel()

    async def _converse(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Read one request and answer it."""
        try:
            data = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_TIMEOUT)
            head = RequestHead.parse(data)
            body = await self._body(head, reader)
            self._silent.pop(task, None)
            self._answered[task] = writer
            answer = await self._answer(head, data, body, writer)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, TimeoutError):
            answer = self._report("400 Bad Request")
        except HttpError as error:
            answer = error.encode()
        if not writer.is_closing():  # the client reset the connection; uvloop would raise a RuntimeError
            writer.write(answer)

    async def _body(self, head: RequestHead, reader: asyncio.StreamReader) -> bytes:
        """Read the body of a control request.

        :raises HttpError: it is too long.
        :raises IncompleteReadError: the client has left before its end.
        :raises TimeoutError: the client takes too long.
        """
        if not head.path.startswith(_CONTROL) or self._control is None:
            return b""
        if head.body_length <= _MAX_BODY:
            return await asyncio.wait_for(reader.readexactly(head.body_length), _BODY_TIMEOUT)
        most = max(_MAX_BODY, self._control.most_body_bytes(head.path.removeprefix(_CONTROL), head))
        if head.body_length > most:
            raise HttpError("413 Content Too Large", f"the body may have at most {most} bytes")
        if self._large_bodies >= _MOST_LARGE_BODIES:
            raise HttpError("503 Service Unavailable", "other large requests are being read", "retry-after: 5")
        self._large_bodies += 1
        try:
            return await asyncio.wait_for(reader.readexactly(head.body_length), _BODY_TIMEOUT)
        finally:
            self._large_bodies -= 1

    async def _answer(self, head: RequestHead, data: bytes, body: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Return the answer, or the part of it that was not sent yet.

        :raises HttpError: the request is refused.
        """
        if head.path == self._live_path:
            return self._report("200 OK")
        if head.path == self._health_path and (self._state() is not State.SERVING or self._problem() is not None):
            return self._report("503 Service Unavailable")
        if head.path.startswith(_CONTROL):
            if self._control is None:
                return self._report("503 Service Unavailable")
            return await self._control.call(head.path.removeprefix(_CONTROL), head, body)
        if head.method not in ("GET", "HEAD"):
            raise HttpError("405 Method Not Allowed", "this path is read-only", "allow: GET, HEAD")
        if head.body_length:
            raise HttpError("400 Bad Request", "this path takes no body")
        if head.path == _METRICS and self._scrape is not None:
            await self._scrape.refresh()
        if self._upstream is None or not await _forward(data, writer, *self._upstream):
            # The runtime has not started yet, or has shut down.
            return self._report("503 Service Unavailable")
        return b""

    def _report(self, status: str) -> bytes:
        """Return an answer with the worker's state."""
        body = {"status": "live" if status.startswith("200") else "notready", "state": self._state().value}
        problem = self._problem()
        if problem is not None:
            body["reason"] = problem
        return http_message.answer(status, body)


async def _forward(data: bytes, writer: asyncio.StreamWriter, host: str, port: int) -> bool:
    """Forward one request without a body; return False if the runtime's server is not listening.

    :raises HttpError: the runtime does not answer.
    """
    try:
        upstream_reader, upstream_writer = await asyncio.wait_for(asyncio.open_connection(host, port), _IDLE_TIMEOUT)
    except (asyncio.TimeoutError, TimeoutError):
        raise HttpError("504 Gateway Timeout", "the runtime's status server accepts no connections") from None
    except OSError:
        return False
    try:
        # One request per connection: the next one may be for /live.
        request_line, _, headers = data.partition(b"\r\n")
        kept = [line for line in headers.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
        upstream_writer.write(b"\r\n".join([request_line, *kept, b"connection: close", b"", b""]))
        try:
            first = await asyncio.wait_for(upstream_reader.read(_COPY_CHUNK), _IDLE_TIMEOUT)
        except (asyncio.TimeoutError, TimeoutError):
            raise HttpError("504 Gateway Timeout", "the runtime's status server does not answer") from None
        try:
            await asyncio.wait_for(_copy(first, upstream_reader, writer), _TOTAL_TIMEOUT)
        except (asyncio.TimeoutError, TimeoutError):
            writer.transport.abort()  # the client must see that the answer is incomplete
    finally:
        upstream_writer.transport.abort()
    return True


async def _copy(data: bytes, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copy an answer until its end, or until one of the two sides has left."""
    with contextlib.suppress(ConnectionError):
        while data and not target.is_closing():
            target.write(data)
            await asyncio.wait_for(_unless_lost(target.drain), _IDLE_TIMEOUT)
            data = await asyncio.wait_for(source.read(_COPY_CHUNK), _IDLE_TIMEOUT)


async def _unless_lost(step: Callable[[], Awaitable[None]]) -> None:
    """Await a step, which also ends when the connection is lost.

    Up to Python 3.11 ``wait_for`` loses an error if it is cancelled at the same time, and asyncio logs a traceback.
    """
    with contextlib.suppress(ConnectionError):
        await step()


async def _end(writer: asyncio.StreamWriter) -> None:
    """Close a connection once everything written was sent; a client that does not read gets limited time."""
    try:
        with contextlib.suppress(OSError):
            writer.close()
            await asyncio.wait_for(_unless_lost(writer.wait_closed), _IDLE_TIMEOUT)
    except (asyncio.CancelledError, asyncio.TimeoutError, TimeoutError):
        writer.transport.abort()
