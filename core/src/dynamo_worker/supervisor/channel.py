"""One end of a socket that carries JSON objects, one per packet: between supervisor, guardian and worker."""

from __future__ import annotations

import json
import socket
from typing import Any

_MOST_BYTES = 64 * 1024

#: Texts and lists of a message are cut to this, which keeps it well within one packet: the reason of an end may hold a
#: compiler's whole output, and a message that is too long for the socket would be lost as a whole.
_MOST_CHARACTERS, _MOST_ITEMS = 2000, 8
_MOST_CHARACTERS_OF_AN_ITEM = 200

#: Messages taken at once: who floods us must not keep us from our timers.
MOST_AT_ONCE = 200


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep packets apart and report the end of the other side."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """Sends and receives without ever blocking or raising."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        #: Whether the other side is gone and everything that it had sent has been received.
        self.closed = False
        #: Whether the other side takes no messages any more; what it had sent before may still wait to be received.
        self.deaf = False
        #: The latest message of each type that could not be sent yet, because the other side does not read.
        self.pending: dict[str, bytes] = {}
        #: Packets that were not JSON objects.
        self.malformed = 0

    def send(self, message_type: str, **fields: Any) -> None:
        """Send one message, now or with ``flush``; long texts and lists are cut."""
        self.pending.pop(message_type, None)  # a later one supersedes it, and comes after the others
        self.pending[message_type] = json.dumps({"type": message_type, **_cut(fields)}).encode()
        self.flush()

    def flush(self) -> None:
        """Send what is pending, as far as it goes."""
        while self.pending and not self.deaf:
            message_type = next(iter(self.pending))
            try:
                self.socket.send(self.pending[message_type])
            except BlockingIOError:
                return
            except OSError:
                self.deaf = True
                return
            del self.pending[message_type]

    def receive(self, most: int = MOST_AT_ONCE) -> list[dict[str, Any]]:
        """Return the messages that have arrived; notes when the other side is gone.

        :param most: packets to take at most.
        """
        messages: list[dict[str, Any]] = []
        for _ in range(most):
            try:
                packet = self.socket.recv(_MOST_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:
                # The other side has ended without reading all we had sent. Linux says so once, before it hands out
                # what that side had sent itself.
                continue
            except OSError:
                packet = b""
            if not packet:
                self.closed = self.deaf = True
                break
            try:
                message = json.loads(packet)
            except (ValueError, RecursionError):
                message = None
            if isinstance(message, dict) and isinstance(message.get("type"), str):
                messages.append(message)
            else:
                self.malformed += 1
        return messages

    def close(self) -> None:
        """Close this end."""
        self.socket.close()
        self.closed = self.deaf = True


def _cut(value: Any, characters: int = _MOST_CHARACTERS) -> Any:
    """Return a JSON value with its texts and lists cut to a bounded length."""
    if isinstance(value, str):
        return value if len(value) <= characters else value[:characters] + "…"
    if isinstance(value, dict):
        return {key: _cut(item, characters) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(item, min(characters, _MOST_CHARACTERS_OF_AN_ITEM)) for item in value[:_MOST_ITEMS]]
    return value
