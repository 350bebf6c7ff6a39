"""One HTTP request with a deadline, from processes that must not spend a tenth of a second on importing a client."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

#: Bytes read of one answer: a value of etcd's default limit (1.5 MiB) in base64 fits.
_MOST_BYTES = 4 << 20
#: The port of an address without one: etcd's.
_DEFAULT_PORT = "2379"


def send(
    method: str,
    address: str,
    path: str,
    content: bytes,
    headers: Mapping[str, str],
    deadline: float,
    tls: ssl.SSLContext | None,
) -> tuple[int, bytes]:
    """Send one request of HTTP/1.0; return the status and the body. Blocks.

    :param address: host and port.
    :param deadline: when to give up (monotonic).
    :param tls: how to secure the connection; None: not at all.
    :raises TimeoutError: no answer in time; the text says what the server did.
    :raises OSError: the server cannot be reached, or does not speak HTTP.
    """
    host, port = _split(address)
    lines = [f"{method} {path} HTTP/1.0", f"Host: {address}", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    request = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + content
    started = time.monotonic()
    with contextlib.ExitStack() as opened:
        try:
            connection = opened.enter_context(socket.create_connection((host, port), _left(deadline)))
        except TimeoutError as error:
            raise TimeoutError("it did not accept a connection in time") from error
        try:
            if tls is not None:
                connection = opened.enter_context(tls.wrap_socket(connection, server_hostname=host))
            return _exchange(connection, request, deadline)
        except TimeoutError as error:
            waited = time.monotonic() - started
            raise TimeoutError(f"it accepted, and did not answer within {waited:.2g} s") from error


def _split(address: str) -> tuple[str, int]:
    """Split an address, ``HOST``, ``HOST:PORT`` or ``[IPv6]:PORT``."""
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, _DEFAULT_PORT
    return host.strip("[]"), int(port)


def _exchange(connection: socket.socket, request: bytes, deadline: float) -> tuple[int, bytes]:
    """Send a request; return the status and the body, which the end of the connection ends.

    :raises OSError: the answer is none of HTTP, or did not come in time.
    """
    connection.settimeout(_left(deadline))
    connection.sendall(request)
    text = b""
    while len(text) < _MOST_BYTES:
        connection.settimeout(_left(deadline))
        piece = connection.recv(1 << 16)
        if not piece:
            break
        text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise OSError(f"not an HTTP server: it answers {text[:40]!r}" if text else "it closed the connection")
    return int(words[1]), body


def _left(deadline: float) -> float:
    """Return the seconds until a deadline (monotonic).

    :raises TimeoutError: it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time left")
    return left
