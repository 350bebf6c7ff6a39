"""The part of HTTP/1.1 that the status server needs: request heads, and answers that are JSON objects."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class HttpError(Exception):
    """A request that is answered with an error.

    :param status: such as ``404 Not Found``.
    :param message: the message for the client.
    :param headers: additional header lines.
    """

    def __init__(self, status: str, message: str, *headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers

    def encode(self) -> bytes:
        """Return the answer."""
        return answer(self.status, {"status": "error", "message": str(self)}, *self.headers)


@dataclass(frozen=True)
class RequestHead:
    """The head of a request.

    :ivar method: as sent; methods are case-sensitive.
    :ivar path: without the query.
    :ivar headers: the values of each header, by its name in lower case.
    """

    method: str
    path: str
    headers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, head: bytes) -> RequestHead:
        """Parse the head of a request.

        :raises HttpError: it is malformed.
        """
        request_line, *lines = head.decode("latin-1").split("\r\n")
        if any(character in line for line in (request_line, *lines) for character in "\r\n\0"):
            # Another reader of these bytes, such as a proxy, may take a single LF for the end of a line or of the head.
            raise HttpError("400 Bad Request", "lines must end with CRLF")
        words = request_line.split(" ", 2)
        if len(words) < 2:
            raise HttpError("400 Bad Request", "malformed request line")
        headers: dict[str, list[str]] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                headers.setdefault(name.lower(), []).append(value.strip(" \t"))
        return cls(words[0], words[1].split("?", 1)[0], headers)

    def header(self, name: str) -> str | None:
        """Return the value of a header, or None if it is missing.

        :raises HttpError: it occurs more than once: a proxy may have used another value.
        """
        values = self.headers.get(name, ())
        if len(values) > 1:
            raise HttpError("400 Bad Request", f"there is more than one {name} header")
        return values[0] if values else None

    @property
    def body_length(self) -> int:
        """The length of the body in bytes.

        :raises HttpError: it is not declared, or not a number.
        """
        if "transfer-encoding" in self.headers:
            raise HttpError("411 Length Required", "send the body in one piece, with a content-length")
        length = self.header("content-length")
        if length is None:
            return 0
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            raise HttpError("400 Bad Request", "content-length must be a number")
        return int(length)


def answer(status: str, body: Mapping[str, Any], *headers: str) -> bytes:
    """Return a complete answer that closes the connection.

    :raises TypeError: the body has a value of a type that JSON does not have.
    :raises ValueError: the body cannot be encoded: it contains itself, for example.
    """
    content = json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status}",
        "content-type: application/json",
        f"content-length: {len(content)}",
        "connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content
