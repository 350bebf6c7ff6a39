"""The supervisor's end of the worker's control socket: receives its status, sends it stop requests."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import channel
from dynamo_worker.supervisor.channel import Channel

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_worker.supervisor.loop import Loop
    from dynamo_worker.supervisor.report import Log
    from dynamo_worker.supervisor.worker_status import WorkerStatus

#: More messages than a socket holds, to reach the last one of a dead worker.
_MOST_AT_THE_END = 1000


class WorkerChannel:
    """Reads the worker's messages as they come.

    :param status: is updated from every message.
    :param on_state: called after the worker has announced a state.
    :param log: gets the format that the worker announces.
    :param on_descriptors: called with a message and the descriptors that came with it, and closes them; without it,
        they are closed.
    :param record: called with every message, and when it came (monotonic).
    """

    def __init__(
        self,
        connection: socket.socket,
        loop: Loop,
        status: WorkerStatus,
        on_state: Callable[[], None],
        log: Log,
        on_descriptors: Callable[[Mapping[str, Any], Sequence[int]], None] | None = None,
        record: Callable[[Mapping[str, Any], float], None] | None = None,
    ) -> None:
        self._channel = Channel(connection, takes_descriptors=True)
        self._on_descriptors = on_descriptors or _close_all
        self._record = record or _ignore
        self._loop = loop
        self._status = status
        self._on_state = on_state
        self._log = log
        #: When the worker closed its end (monotonic).
        self.closed_at: float | None = None
        loop.add(connection.fileno(), self.receive)

    @property
    def closed(self) -> bool:
        """Whether the worker has closed its end."""
        return self._channel.closed

    def receive(self, most: int = channel.MOST_AT_ONCE) -> None:
        """Receive the messages that have arrived."""
        malformed = self._channel.malformed
        for message in self._channel.receive(most):
            if descriptors := message.pop("descriptors", ()):
                self._on_descriptors(message, descriptors)
            now = time.monotonic()
            self._record(message, now)
            if self._status.take(message, now):
                self._on_state()
        if self._status.log_format is not None:
            self._log.as_json = self._status.log_format == "json"
        if self._channel.malformed and not malformed:
            self._log.warning("Ignoring malformed control message")
        if self._channel.closed:
            self._loop.remove(self._channel.socket.fileno())
            self.closed_at = time.monotonic()

    def receive_rest(self) -> None:
        """Receive everything that a dead worker has sent."""
        if not self.closed:
            self.receive(_MOST_AT_THE_END)

    def stop(self, level: int, signal_name: str, at: float) -> bool:
        """Ask the worker to stop; return False if it does not listen and has not announced its end.

        :param level: 1: gracefully, 2: within ``FORCED_STOP`` seconds.
        :param at: when the signal came (monotonic).
        """
        self._channel.send("stop", level=level, signal=signal_name, at=at)
        self._watch_output()
        if self._channel.deaf and not self.closed:
            self.receive()  # its announcement of the end may still be unread
        return not self._channel.deaf or self._status.said_farewell

    def _watch_output(self) -> None:
        """Send messages that the worker has not accepted yet as soon as it does."""
        if not self.closed:  # the loop no longer watches a closed descriptor
            flush = self._flush if self._channel.pending and not self._channel.deaf else None
            self._loop.on_output(self._channel.socket.fileno(), self.receive, flush)

    def _flush(self) -> None:
        self._channel.flush()
        self._watch_output()


def _close_all(_message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _ignore(_message: Mapping[str, Any], _now: float) -> None:
    """Record nothing."""
