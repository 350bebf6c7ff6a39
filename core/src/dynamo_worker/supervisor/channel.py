"""One end of a socket that carries JSON objects, one per packet: between supervisor, guardian and worker."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_BYTES = 64 * 1024

#: Descriptors that may come with one message.
_MOST_DESCRIPTORS = 2

#: Texts and lists are cut to these lengths, which keeps a message well within one packet: a reason may contain a whole
#: compiler log, and a message too long for the socket would be lost.
_MOST_CHARACTERS, _MOST_ITEMS = 2000, 8
_MOST_CHARACTERS_OF_AN_ITEM = 200

#: Messages taken at once: a flood must not keep us from our timers.
MOST_AT_ONCE = 200


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that preserve packets and notice when the other end closes."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """Sends and receives; never blocks, never raises.

    :param takes_descriptors: whether messages may come with descriptors. Those of a message are its item
        ``descriptors``, and the caller of ``receive`` closes them.
    """

    def __init__(self, connection: socket.socket, *, takes_descriptors: bool = False) -> None:
        connection.setblocking(False)
        self._takes_descriptors = takes_descriptors
        self.socket = connection
        #: Whether the other end is closed and everything it sent has been received.
        self.closed = False
        #: Whether the other end no longer takes messages; what it sent earlier may still be waiting.
        self.deaf = False
        #: The latest message of each type that could not be sent yet because the other side is not reading.
        self.pending: dict[str, bytes] = {}
        #: Packets that were not JSON objects.
        self.malformed = 0

    def send(self, message_type: str, **fields: Any) -> None:
        """Send one message, now or by a later ``flush``; long texts and lists are cut."""
        self.pending.pop(message_type, None)  # replaces an earlier one, and goes to the end of the queue
        self.pending[message_type] = json.dumps({"type": message_type, **_cut(fields)}).encode()
        self.flush()

    def send_descriptors(self, message_type: str, descriptors: Sequence[int], **fields: Any) -> bool:
        """Send a message with copies of descriptors; return False if the other side does not take it now."""
        if self.deaf:
            return False
        message = json.dumps({"type": message_type, **_cut(fields)}).encode()
        try:
            socket.send_fds(self.socket, [message], list(descriptors))
        except OSError:
            return False
        return True

    def flush(self) -> None:
        """Send as much of what is pending as the socket takes."""
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
        """Return the messages that have arrived, and notice when the other end is closed.

        :param most: packets to take at most.
        """
        messages: list[dict[str, Any]] = []
        for _ in range(most):
            descriptors: list[int] = []
            try:
                packet, descriptors = self._receive_packet()
            except BlockingIOError:
                break
            except ConnectionResetError:
                # The other side ended without reading everything we sent. Linux reports that once, before it hands
                # out what that side had sent itself.
                continue
            except OSError:
                packet = b""
            if not packet:
                _close_all(descriptors)
                self.closed = self.deaf = True
                break
            try:
                message = json.loads(packet)
            except (ValueError, RecursionError):
                message = None
            if isinstance(message, dict) and isinstance(message.get("type"), str):
                message.pop("descriptors", None)  # a number in the text could be any descriptor of ours
                if descriptors:
                    message["descriptors"] = descriptors
                messages.append(message)
            else:
                _close_all(descriptors)
                self.malformed += 1
        return messages

    def _receive_packet(self) -> tuple[bytes, list[int]]:
        if not self._takes_descriptors:
            return self.socket.recv(_MOST_BYTES), []
        return receive_with_descriptors(self.socket, _MOST_BYTES, _MOST_DESCRIPTORS)

    def close(self) -> None:
        """Close this end."""
        self.socket.close()
        self.closed = self.deaf = True


def receive_with_descriptors(connection: socket.socket, most_bytes: int, most: int) -> tuple[bytes, list[int]]:
    """Receive one packet and the descriptors that come with it, which no child process inherits.

    ``socket.recv_fds`` ignores its flags, so a process that another thread starts could inherit them.

    :param most: descriptors to take at most.
    :raises OSError: nothing can be received.
    """
    descriptors = array.array("i")
    space = socket.CMSG_LEN(most * descriptors.itemsize)
    packet, ancillary, _, _ = connection.recvmsg(most_bytes, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return packet, list(descriptors)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _cut(value: Any, characters: int = _MOST_CHARACTERS) -> Any:
    """Return a JSON value with texts and lists of bounded length."""
    if isinstance(value, str):
        return value if len(value) <= characters else value[:characters] + "…"
    if isinstance(value, dict):
        return {key: _cut(item, characters) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(item, min(characters, _MOST_CHARACTERS_OF_AN_ITEM)) for item in value[:_MOST_ITEMS]]
    return value
