"""One end of a socket that carries JSON objects, one per packet: to the worker, and to the guardian."""

from __future__ import annotations

import json
import socket
from collections import deque
from typing import Any

_MOST_BYTES = 64 * 1024

#: Messages taken at once: who floods us must not keep us from our timers.
_MOST_AT_ONCE = 200

#: Messages kept for a peer that does not read; the oldest go first.
_MOST_PENDING = 16


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep packets apart and report the end of the other side."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """Sends and receives without ever blocking or raising."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        #: Whether the other side is gone.
        self.closed = False
        #: Messages that could not be sent yet, because the other side does not read.
        self.pending: deque[bytes] = deque(maxlen=_MOST_PENDING)
        #: Packets that were not JSON objects.
        self.malformed = 0

    def send(self, message_type: str, **fields: Any) -> None:
        """Send one message, now or as soon as the other side reads."""
        self.pending.append(json.dumps({"type": message_type, **fields}).encode())
        self.flush()

    def flush(self) -> None:
        """Send what is pending, as far as it goes."""
        while self.pending and not self.closed:
            try:
                self.socket.send(self.pending[0])
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            self.pending.popleft()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; notes when the other side is gone."""
        messages: list[dict[str, Any]] = []
        for _ in range(_MOST_AT_ONCE):
            try:
                packet = self.socket.recv(_MOST_BYTES)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self.closed = True
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
        self.closed = True
