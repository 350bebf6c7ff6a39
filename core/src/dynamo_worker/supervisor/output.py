"""Output that never blocks: a log collector that hangs must not block the worker or its supervisor."""

from __future__ import annotations

import os
import select
import socket
import stat
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Most bytes that wait for a reader; lines beyond that are dropped and counted.
MOST_WAITING = 1 << 20

#: Bytes that a pipe takes at once or not at all, so lines of several writers do not mix.
_AT_ONCE = select.PIPE_BUF

#: Seconds at the end to read the last output of the worker's tree, and for the reader to take it.
LAST_OUTPUT = 0.2


class Output:
    """Writes lines to a descriptor; what does not fit now waits in a bounded buffer.

    :param lost: makes the line that reports a number of dropped lines.
    """

    def __init__(self, descriptor: int, lost: Callable[[int], bytes]) -> None:
        self.descriptor = descriptor
        self.lost = lost
        self._waiting = bytearray()
        self._ends_line = True
        # Lines are dropped until there is room again and the current line is complete.
        self._losing = False
        self._torn = False
        self._dropped = 0
        self._reported = 0

    @property
    def pending(self) -> bool:
        """Whether output is waiting for the reader."""
        return bool(self._waiting)

    def write(self, data: bytes) -> None:
        """Write what fits, keep the rest for :meth:`flush`, and drop the excess. Never blocks, never raises."""
        if self._torn:
            end = data.find(b"\n") + 1
            if not end:
                return
            self._dropped += 1
            self._torn = False
            data = data[end:]
        self.flush()
        room = 0 if self._losing else MOST_WAITING - len(self._waiting)
        if len(data) > room:
            kept = data.rfind(b"\n", 0, room) + 1
            self._append(data[:kept])
            self._lose(data[kept:])
        else:
            self._append(data)
        self.flush()

    def flush(self) -> None:
        """Write as much of what is waiting as the reader takes."""
        self._resume()
        while self._waiting:
            piece = bytes(self._waiting[:_AT_ONCE])
            if len(self._waiting) > _AT_ONCE:
                piece = piece[: piece.rfind(b"\n") + 1] or piece
            try:
                written = write_now(self.descriptor, piece)
            except BlockingIOError:
                return
            except OSError:  # no reader, or the disk is full
                self._dropped += self._waiting.count(b"\n") + max(0, self._reported - 1)
                self._losing = True
                self._reported = 0
                self._waiting.clear()
                return
            del self._waiting[:written]
            if not self._waiting:
                self._reported = 0
                self._resume()

    def forget(self) -> None:
        """Leave what is waiting to the process that forked us."""
        self._waiting.clear()
        self._dropped = self._reported = 0

    def drain(self, seconds: float) -> None:
        """Give the reader a number of seconds to take what is waiting."""
        deadline = time.monotonic() + seconds
        self.flush()
        while self._waiting and writable(self.descriptor, deadline - time.monotonic()):
            self.flush()

    def _append(self, data: bytes) -> None:
        if data:
            self._waiting += data
            self._ends_line = data.endswith(b"\n")

    def _lose(self, data: bytes) -> None:
        if not self._ends_line:
            self._append(b"\n")
        self._losing = True
        self._dropped += data.count(b"\n")
        self._torn = bool(data) and not data.endswith(b"\n")

    def _resume(self) -> None:
        """Accept lines again once half of the buffer is free, and report how many are missing here."""
        if self._losing and not self._torn and len(self._waiting) <= MOST_WAITING // 2:
            self._losing = False
            if self._dropped:
                self._append(self.lost(self._dropped))
                self._reported, self._dropped = self._dropped, 0


def write_now(descriptor: int, data: bytes) -> int:
    """Write what a descriptor takes without waiting, and return the number of bytes.

    Setting ``O_NONBLOCK`` would affect every process that shares the terminal or pipe with us. So it is opened again,
    each time: a copy kept open would not survive a fork, which closes unknown descriptors.

    :raises BlockingIOError: nothing fits now.
    :raises OSError: nothing could be written.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=descriptor)
        try:
            return connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            connection.detach()  # no duplicate: there may be no descriptor left
    if not stat.S_ISFIFO(mode) and not os.isatty(descriptor):
        return os.write(descriptor, data)  # a file takes everything at once
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # another user's, without a reader, or no descriptor left
        if not writable(descriptor, 0):
            raise BlockingIOError from None
        return os.write(descriptor, data[:_AT_ONCE])
    try:
        return os.write(own, data)
    finally:
        os.close(own)


def writable(descriptor: int, seconds: float) -> bool:
    """Return whether a descriptor becomes writable within a number of seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def open_standard_streams() -> None:
    """Open closed standard descriptors on /dev/null, or the next socket we open would become stderr."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    # The interpreter creates no stream for a descriptor that was closed when it started.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
