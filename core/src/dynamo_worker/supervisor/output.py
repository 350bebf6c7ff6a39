"""Output that waits for nobody: a log collector that hangs must stop neither a worker nor its supervisor."""

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

#: So much waits for a reader, in bytes; what comes on top is dropped and counted.
MOST_WAITING = 1 << 20

#: A pipe takes so much at once or not at all, so that lines of several writers do not mix.
_AT_ONCE = select.PIPE_BUF

#: How long we look, at the end, for what the worker's tree has printed last, and wait for the reader to take it.
LAST_OUTPUT = 0.2


class Output:
    """A descriptor that lines are written to; what it does not take now waits in a bounded buffer.

    :param lost: makes the line that says how many were dropped.
    """

    def __init__(self, descriptor: int, lost: Callable[[int], bytes]) -> None:
        self.descriptor = descriptor
        self.lost = lost
        self._waiting = bytearray()
        self._ends_line = True
        # Losing lines: until there is room again, and the current line has come to its end.
        self._losing = False
        self._torn = False
        self._dropped = 0
        self._reported = 0

    @property
    def pending(self) -> bool:
        """Whether something waits for the reader."""
        return bool(self._waiting)

    def write(self, data: bytes) -> None:
        """Write what fits, keep the rest for :meth:`flush`, and drop what is too much. Never blocks, never raises."""
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
        """Write what is waiting, as far as the reader takes it."""
        self._resume()
        while self._waiting:
            piece = bytes(self._waiting[:_AT_ONCE])
            if len(self._waiting) > _AT_ONCE:
                piece = piece[: piece.rfind(b"\n") + 1] or piece
            try:
                written = write_now(self.descriptor, piece)
            except BlockingIOError:
                return
            except OSError:  # the reader is gone, or the disk is full
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
        """Leave what is waiting to the process that we were just forked from."""
        self._waiting.clear()
        self._dropped = self._reported = 0

    def drain(self, seconds: float) -> None:
        """Give the reader so many seconds to take what is waiting."""
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
        """Take lines again once half of the room is free, and say how many are missing here."""
        if self._losing and not self._torn and len(self._waiting) <= MOST_WAITING // 2:
            self._losing = False
            if self._dropped:
                self._append(self.lost(self._dropped))
                self._reported, self._dropped = self._dropped, 0


def write_now(descriptor: int, data: bytes) -> int:
    """Write what a descriptor takes without waiting, and return how many bytes that were.

    ``O_NONBLOCK`` is no way: it would hold for every process that shares the terminal or pipe with us. So it is opened
    once more, each time, because whoever forks closes what he does not know.

    :raises OSError: nothing was written; BlockingIOError: nothing fits now.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=descriptor)
        try:
            return connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            connection.detach()  # without a descriptor of its own: there may be none left
    if not stat.S_ISFIFO(mode) and not os.isatty(descriptor):
        return os.write(descriptor, data)  # a file takes everything at once
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # it belongs to another user, nobody reads it any more, or no descriptor is left
        if not writable(descriptor, 0):
            raise BlockingIOError from None
        return os.write(descriptor, data[:_AT_ONCE])
    try:
        return os.write(own, data)
    finally:
        os.close(own)


def writable(descriptor: int, seconds: float) -> bool:
    """Return whether a descriptor becomes writable within so many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def open_standard_streams() -> None:
    """Give every closed standard descriptor something harmless, or the next socket we open would become stderr."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    # The interpreter has none for a descriptor that was closed when it started.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
