"""One request to an HTTP/1.1 server and its answer, over a connection of its own.

Closing the connection is the one thing that stops every server's work for a request, so connections are not shared and
not kept: an idle one would also hold a thread of servers such as llama.cpp's. Nothing here follows redirects, asks the
environment for proxies, or reads more than the caller has taken.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import httptools

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from dynamo_worker_server.arguments import Address

#: Seconds to connect, TLS included.
_CONNECT_SECONDS: Final = 10.0
#: Bytes of an answer's head, and of what may come between two parts of its body or after the last one.
_HEAD_BYTES: Final = 65_536
#: Bytes that may wait for the caller before the connection is read no further: then the server has to wait.
_WAITING_BYTES: Final = 262_144


#: How a server that expects TLS answers plain HTTP.
_TLS_ALERT: Final = b"\x15\x03"


class HttpError(ConnectionError):
    """The server's answer is not HTTP, or larger than it may be."""


class HttpExchange(asyncio.Protocol):
    """One request and its answer.

    :ivar status: the status code, once :meth:`head` has returned.
    :ivar headers: those headers that matter here, by lower-case name.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._head: asyncio.Future[None] = self._loop.create_future()
        self._head.add_done_callback(lambda head: head.cancelled() or head.exception())
        #: Bytes since the last part of the body, or since the beginning.
        self._overhead = 0
        self._parts: list[bytes] = []
        self._size = 0
        self._paused = False
        self._complete = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], bool] | None = None

    @classmethod
    async def begin(cls, address: Address, tls: ssl.SSLContext | None, request: bytes) -> HttpExchange:
        """Connect and send a request.

        :raises OSError: the server cannot be reached.
        """
        connecting = asyncio.get_running_loop().create_connection(
            cls, address.host, address.port, ssl=tls, server_hostname=address.host if tls is not None else None
        )
        try:
            transport, exchange = await asyncio.wait_for(connecting, _CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionError(f"no connection to {address} within {_CONNECT_SECONDS:g} s") from None
        transport.write(request)
        return exchange

    async def head(self) -> int:
        """Wait for the head of the answer, and return its status code.

        :raises OSError: the connection has ended, or the answer is not HTTP.
        """
        await self._head
        return self.status

    async def read(self) -> bytes:
        """Return the next part of the body, or nothing at its end.

        :raises OSError: the connection has ended early, or the answer is not HTTP.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._complete:
                return b""
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def deliver(self, take: Callable[[bytes], bool]) -> None:
        """Call ``take`` for each part of the body as it arrives, and return at its end, or once ``take`` returns true.

        No task is woken for a part, and nothing waits here: ``take`` keeps what its own reader does not take.

        :raises OSError: the connection has ended early, or the answer is not HTTP.
        :raises BaseException: what ``take`` has raised.
        """
        self._take = take
        if self._parts:
            waiting = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            if take(waiting):
                return
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        await self.read()  # there is nothing but the end

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body.

        :param limit: most bytes that it may have.
        :raises OSError: it has more, the connection has ended early, or the answer is not HTTP.
        """
        body = bytearray()
        while data := await self.read():
            body += data
            if len(body) > limit:
                raise HttpError(f"the answer has more than {limit} bytes")
        return bytes(body)

    def close(self) -> None:
        """Close the connection at once, which makes the server stop working for it. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._fail(ConnectionAbortedError("the request was given up"))

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "pause_reading")
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self._error is not None:
            return
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
            # The parser keeps a header, or a trailer, for as long as it goes on.
            if self._overhead > _HEAD_BYTES:
                part = "trailer" if self._head.done() else "head"
                raise HttpError(f"the {part} of the answer has more than {_HEAD_BYTES} bytes")
        except httptools.HttpParserUpgrade:
            self._give_up(HttpError("the server has switched to another protocol"))
        except httptools.HttpParserError as error:
            cause = error.__context__
            reason = "it is TLS, which https:// is for" if data.startswith(_TLS_ALERT) else error
            self._give_up(cause if isinstance(cause, HttpError) else HttpError(f"the answer is not HTTP: {reason}"))
        except HttpError as error:
            self._give_up(error)

    def connection_lost(self, error: Exception | None) -> None:
        """End the answer."""
        if self._complete:
            return
        # Without a length the end of the connection is that of the body.
        unframed = not (b"content-length" in self.headers or b"transfer-encoding" in self.headers)
        if error is None and self._head.done() and unframed:
            self._complete = True
            self._wake()
            return
        reason = f": {error}" if error is not None else ""
        self._fail(ConnectionResetError(f"the server has closed the connection before the end of its answer{reason}"))

    # --- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the headers that matter."""
        name = name.lower()
        if name in _HEADERS:
            self.headers[name] = value[:1000]

    def on_headers_complete(self) -> None:
        """Hand the status over."""
        self.status = self._parser.get_status_code()
        if self.status < 200:  # another head follows
            self.headers.clear()
            return
        if self.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise HttpError("the answer is compressed, although the request has asked for none of that")
        if not self._head.done():
            self._head.set_result(None)

    def on_body(self, data: bytes) -> None:
        """Hand a part of the body over, or keep it and stop reading if the caller does not come for it."""
        self._overhead = 0
        if self._take is not None:
            if self._complete or self._error is not None:  # one read may hold several parts
                return
            try:
                if self._take(data):
                    self._complete = True
                    self._wake()
            except BaseException as error:
                self._give_up(error)
            return
        self._parts.append(data)
        self._size += len(data)
        if self._size > _WAITING_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def on_message_complete(self) -> None:
        """End the answer; whatever follows is not read."""
        if self.status < 200:
            return
        self._complete = True
        self._wake()
        if self._transport is not None:
            self._transport.close()

    def _give_up(self, error: BaseException) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._error is None and not self._complete:
            self._error = error
            if not self._head.done():
                self._head.set_exception(error)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_HEADERS: Final = frozenset(
    {b"content-length", b"transfer-encoding", b"content-type", b"content-encoding", b"location"}
)


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return a request as it is sent; the server is told to close the connection afterwards.

    :param headers: must hold no line breaks.
    """
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
