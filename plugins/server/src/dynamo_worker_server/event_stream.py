"""Server-sent events: takes a stream apart into the data of its events."""

from __future__ import annotations

from typing import Final

#: Bytes of one event. Chunks with the log probabilities of many tokens have some ten thousand.
MOST_BYTES: Final = 1_048_576


class EventStreamError(ConnectionError):
    """An event is longer than any can be."""


class EventStream:
    """Takes the bytes of a stream in any parts, and returns the data of each event as soon as it is complete.

    Lines end with LF or CR LF. Comments and the fields ``id`` and ``retry`` are skipped. ``error: DATA``, with which
    older llama.cpp servers report an error, is an event as well.
    """

    __slots__ = ("_data", "_line", "_size")

    def __init__(self) -> None:
        #: The beginning of a line; a bytearray, because one that grows byte by byte must not be copied each time.
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that are complete.

        :raises EventStreamError: one is too long.
        """
        if received.startswith(b"data: ") and received.endswith(b"\n\n") and not self._line and not self._data:
            event = received[6:-2]
            if b"\n" not in event:  # nearly always: servers send each chunk as it is made
                return [event]
        events: list[bytes] = []
        lines = received.split(b"\n")
        rest = lines.pop()
        if lines and self._line:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
                self._size += len(line)
            elif line in (b"", b"\r"):
                if self._data:
                    events.append(self._data[0].strip() if len(self._data) == 1 else self._joined())
                    self._data.clear()
                    self._size = 0
            elif line.startswith(b"error:"):
                events.append(b'{"error":%s}' % line[6:].strip())
        self._line += rest
        if len(self._line) + self._size > MOST_BYTES:
            raise EventStreamError(f"an event of the server's answer has more than {MOST_BYTES} bytes")
        return events

    def _joined(self) -> bytes:
        return b"\n".join(part.strip() for part in self._data)
