"""The worker's status server: ``/live`` and "not ready" of its own in front of the runtime's status server.

The runtime answers ``/live`` and ``/health`` with one handler (measured on 1.6.1), so the kubelet would restart a
worker that is only not ready, and it closes its server when its shutdown starts. This server owns the configured port,
answers ``/live`` for as long as the worker lives and ``/health`` for as long as it does not serve or is out of
discovery, and hands every other request through to the runtime's server on a port of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from typing import TYPE_CHECKING

from dynamo_worker.errors import StartError
from dynamo_worker.lifecycle import State
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

log = get_logger(__name__)

#: Largest request head that is read, in bytes.
_MAX_HEAD = 16 * 1024
#: How long a client may take to send its request head, in seconds.
_HEAD_TIMEOUT = 10.0
#: Connections at once. One more ends the oldest that has not asked for anything yet, or the oldest of all: clients that
#: never finish must not use up the descriptors that requests need, nor keep a probe from its answer.
_MOST_CONNECTIONS = 64
_COPY_CHUNK = 64 * 1024


class StatusServer:
    """The probes, and a way through to the runtime's status server for everything else."""

    def __init__(
        self,
        state: Callable[[], State],
        *,
        live_path: str,
        health_path: str,
        problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Answer with ``state()``.

        :param problem: says why a worker that serves is not ready, None if it is.
        :param live_path: path of the liveness probe (``DYN_SYSTEM_LIVE_PATH``).
        :param health_path: path of the readiness probe (``DYN_SYSTEM_HEALTH_PATH``).
        """
        self._state = state
        self._problem = problem
        self._live_path = live_path
        self._health_path = health_path
        self._server: asyncio.Server | None = None
        self._upstream: tuple[str, int] | None = None
        # Sets that remember the order: who has yet to ask, and who is being answered.
        self._silent: dict[asyncio.StreamWriter, None] = {}
        self._answered: dict[asyncio.StreamWriter, None] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port (a free one if ``port`` is 0).

        :raises StartError: the address cannot be used.
        """
        try:
            # The host is a number. uvloop would look it up all the same, in threads, and abort where it gets none.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
            self._server = await asyncio.start_server(self._serve, sock=listener, limit=_MAX_HEAD)
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

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._silent) + len(self._answered) >= _MOST_CONNECTIONS:
            crowd = self._silent or self._answered
            oldest = next(iter(crowd))
            del crowd[oldest]
            oldest.transport.abort()
        self._silent[writer] = None
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_TIMEOUT)
            self._silent.pop(writer, None)
            self._answered[writer] = None
            path = head.split(b" ", 2)[1].split(b"?", 1)[0].decode("ascii", "replace")
            if path == self._live_path:
                self._answer(writer, "200 OK")
            elif path == self._health_path and (self._state() is not State.SERVING or self._problem() is not None):
                self._answer(writer, "503 Service Unavailable")
            elif self._upstream is None or not await self._forward(head, reader, writer, *self._upstream):
                # No runtime yet, or none any more.
                self._answer(writer, "503 Service Unavailable")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, IndexError):
            self._answer(writer, "400 Bad Request")
        except OSError as error:
            log.debug("Status connection lost", error=error)
        finally:
            self._silent.pop(writer, None)
            self._answered.pop(writer, None)
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()

    def _answer(self, writer: asyncio.StreamWriter, status: str) -> None:
        if writer.is_closing():  # the client has reset it; uvloop would raise a RuntimeError
            return
        answer = {"status": "live" if status.startswith("200") else "notready", "state": self._state().value}
        problem = self._problem()
        if problem is not None:
            answer["reason"] = problem
        body = json.dumps(answer)
        writer.write(
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"connection: close\r\n\r\n{body}".encode()
        )

    async def _forward(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int
    ) -> bool:
        """Hand one request through; return False if there is nobody to hand it to."""
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
        except OSError:
            return False
        try:
            # One request a connection: the next one may be for /live again.
            request_line, _, headers = head.partition(b"\r\n")
            kept = [line for line in headers.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
            upstream_writer.write(b"\r\n".join([request_line, *kept, b"connection: close", b"", b""]))
            upload = asyncio.ensure_future(_copy(reader, upstream_writer))
            try:
                await _copy(upstream_reader, writer)
            finally:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)
        finally:
            upstream_writer.close()
        return True


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while (data := await source.read(_COPY_CHUNK)) and not target.is_closing():
        target.write(data)
        await target.drain()
