"""The worker's status server: probes, control routes, and a way through to the runtime's status server.

The runtime answers ``/live`` and ``/health`` with one handler (measured on 1.6.1), so the kubelet would restart a
worker that is only not ready, and it closes its server when its shutdown starts. This server owns the configured port,
answers ``/live`` for as long as the worker lives and ``/health`` for as long as it does not serve or is out of
discovery. The control routes are its own, too: the runtime would serve them to whoever asks, with any method. Other
requests it hands through to the runtime's server on a port of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import TYPE_CHECKING

from dynamo_worker.errors import StartError
from dynamo_worker.host import http_message
from dynamo_worker.host.control_routes import ControlAccess, ControlRoutes
from dynamo_worker.host.http_message import HttpError, RequestHead
from dynamo_worker.lifecycle import State
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from dynamo_worker.engine import Operation

log = get_logger(__name__)

#: Where the control routes are.
_CONTROL = "/engine/"
#: Largest request head that is read, in bytes.
_MAX_HEAD = 16 * 1024
#: Largest body of a control route, in bytes. They hold a few names and numbers.
_MAX_BODY = 64 * 1024
#: How long a client may take to send its request head, in seconds.
_HEAD_TIMEOUT = 10.0
#: How long it may take to send the body.
_BODY_TIMEOUT = 10.0
#: How long the runtime may be silent, and a client may not read.
_IDLE_TIMEOUT = 20.0
#: How long the runtime's answer may take to go through.
_TOTAL_TIMEOUT = 60.0
#: Connections at once. One more ends the oldest of those that have not asked for anything yet, or of those that are
#: being answered, whichever are more: clients that never finish must not use up the descriptors that requests need, nor
#: keep a probe from its answer.
_MOST_CONNECTIONS = 64
#: For how many turns of the event loop nobody has to make room: who has connected at the same time may have asked
#: already, and is answered first, even if the loop has had no core for a while and finds hundreds of them.
_TURNS_TO_ASK = 3
#: Connections that wait until the event loop accepts them. The kernel drops those beyond, and their clients try again
#: after a second.
_BACKLOG = 256
_COPY_CHUNK = 64 * 1024


class StatusServer:
    """The probes, the control routes, and a way through to the runtime's status server for everything else."""

    def __init__(
        self,
        state: Callable[[], State],
        *,
        live_path: str,
        health_path: str,
        problem: Callable[[], str | None] = lambda: None,
        access: ControlAccess | None = None,
    ) -> None:
        """Answer with ``state()``.

        :param problem: says why a worker that serves is not ready, None if it is.
        :param live_path: path of the liveness probe (``DYN_SYSTEM_LIVE_PATH``).
        :param health_path: path of the readiness probe (``DYN_SYSTEM_HEALTH_PATH``).
        :param access: who may call the control routes.
        """
        self._state = state
        self._problem = problem
        self._live_path = live_path
        self._health_path = health_path
        self._access = access or ControlAccess()
        self._server: asyncio.Server | None = None
        self._upstream: tuple[str, int] | None = None
        self._control: ControlRoutes | None = None
        # Dictionaries that remember the order: who has yet to ask, or to send the whole body; who is being answered.
        self._silent: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._answered: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port (a free one if ``port`` is 0).

        :raises StartError: the address cannot be used.
        """
        try:
            # The host is a number. uvloop would look it up all the same, in threads, and abort where it gets none.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
            self._server = await asyncio.start_server(self._serve, sock=listener, limit=_MAX_HEAD, backlog=_BACKLOG)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise StartError(
                f"the status server's address {host}:{port} {why}",
                hint="choose another with --system-port (DYN_SYSTEM_PORT), or -1 for none",
            ) from error
        actual: int = self._server.sockets[0].getsockname()[1]
        return actual

    def forward_to(self, host: str, port: int) -> None:
        """Hand requests through to the runtime's status server from now on."""
        anywhere = host in ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound
        self._upstream = ("127.0.0.1" if anywhere else host, port)

    def serve_routes(self, routes: Mapping[str, Operation]) -> None:
        """Serve these control routes from now on."""
        self._control = ControlRoutes(routes, self._access)

    def stop_routes(self) -> None:
        """Serve no control routes any more: the engine is about to go. Operations that run go on."""
        self._control = None

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._silent[task] = writer
        try:
            await self._make_room()
            await self._converse(task, reader, writer)
        except asyncio.CancelledError:  # others need its place; nobody waits for this task
            pass
        except OSError as error:
            log.debug("Status connection lost", error=error)
        finally:
            await _end(writer)
            self._silent.pop(task, None)
            self._answered.pop(task, None)

    async def _make_room(self) -> None:
        """End a connection if there are too many."""
        if len(self._silent) + len(self._answered) <= _MOST_CONNECTIONS:
            return
        for _ in range(_TURNS_TO_ASK):
            await asyncio.sleep(0)
        if len(self._silent) + len(self._answered) > _MOST_CONNECTIONS:
            # The larger crowd: otherwise a probe that has just connected would be all that there is to end, as soon as
            # the others have asked for something that takes long.
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
            takes_body = head.path.startswith(_CONTROL) and self._control is not None
            body = await _body(head, reader) if takes_body else b""
            self._silent.pop(task, None)
            self._answered[task] = writer
            answer = await self._answer(head, data, body, writer)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, TimeoutError):
            answer = self._report("400 Bad Request")
        except HttpError as error:
            answer = error.encode()
        if not writer.is_closing():  # the client has reset it; uvloop would raise a RuntimeError
            writer.write(answer)

    async def _answer(self, head: RequestHead, data: bytes, body: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Return what the client has yet to be told.

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
            raise HttpError("405 Method Not Allowed", "this path can only be read", "allow: GET, HEAD")
        if head.body_length:
            raise HttpError("400 Bad Request", "this path takes no body")
        if self._upstream is None or not await _forward(data, writer, *self._upstream):
            # No runtime yet, or none any more.
            return self._report("503 Service Unavailable")
        return b""

    def _report(self, status: str) -> bytes:
        """Return an answer that says how the worker is."""
        body = {"status": "live" if status.startswith("200") else "notready", "state": self._state().value}
        problem = self._problem()
        if problem is not None:
            body["reason"] = problem
        return http_message.answer(status, body)


async def _body(head: RequestHead, reader: asyncio.StreamReader) -> bytes:
    """Read the body of a request.

    :raises HttpError: it is too long.
    :raises IncompleteReadError: the client has left before its end.
    :raises TimeoutError: the client takes too long.
    """
    length = head.body_length
    if length > _MAX_BODY:
        raise HttpError("413 Content Too Large", f"the body may have {_MAX_BODY} bytes")
    return await asyncio.wait_for(reader.readexactly(length), _BODY_TIMEOUT)


async def _forward(data: bytes, writer: asyncio.StreamWriter, host: str, port: int) -> bool:
    """Hand one request without a body through; return False if there is nobody to hand it to.

    :raises HttpError: the runtime does not answer.
    """
    try:
        upstream_reader, upstream_writer = await asyncio.wait_for(asyncio.open_connection(host, port), _IDLE_TIMEOUT)
    except (asyncio.TimeoutError, TimeoutError):
        raise HttpError("504 Gateway Timeout", "the runtime's status server takes no connections") from None
    except OSError:
        return False
    try:
        # One request a connection: the next one may be for /live again.
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
            writer.transport.abort()  # so that the client sees that its answer is torn
    finally:
        upstream_writer.transport.abort()
    return True


async def _copy(data: bytes, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Write an answer until its end, or until one of the two has left."""
    with contextlib.suppress(ConnectionError):
        while data and not target.is_closing():
            target.write(data)
            await asyncio.wait_for(_unless_lost(target.drain()), _IDLE_TIMEOUT)
            data = await asyncio.wait_for(source.read(_COPY_CHUNK), _IDLE_TIMEOUT)


async def _unless_lost(step: Awaitable[None]) -> None:
    """Wait for something, or until the connection is lost.

    Up to Python 3.11 ``wait_for`` loses an error if it is cancelled at the same time, and asyncio logs a traceback.
    """
    with contextlib.suppress(ConnectionError):
        await step


async def _end(writer: asyncio.StreamWriter) -> None:
    """Close a connection once what was written has left; a client that does not read has a limited time for it."""
    try:
        with contextlib.suppress(OSError):
            writer.close()
            await asyncio.wait_for(_unless_lost(writer.wait_closed()), _IDLE_TIMEOUT)
    except (asyncio.CancelledError, asyncio.TimeoutError, TimeoutError):
        writer.transport.abort()
