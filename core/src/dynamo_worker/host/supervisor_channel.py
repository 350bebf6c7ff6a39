"""The worker's end of the channel to its supervisor: JSON objects, one per packet, both ways."""

from __future__ import annotations

import faulthandler
import os
import socket
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor.channel import Channel
from dynamo_worker.supervisor.protocol import CONTROL_FD, STACK, STACK_SIGNAL

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence


class SupervisorChannel:
    """Sends states, heartbeats and the final reason to the supervisor, and receives stop requests.

    Without a supervisor (``--no-supervise``) it does nothing.

    :param connection: the worker's end of the control socket, or None.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._channel = Channel(connection) if connection is not None else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = False

    @classmethod
    def from_environment(cls) -> SupervisorChannel:
        """Take over the socket named in the environment, once: children must not inherit it."""
        descriptor = os.environ.pop(CONTROL_FD, None)
        if descriptor is None:
            return cls(None)
        connection = socket.socket(fileno=int(descriptor))
        connection.set_inheritable(False)
        return cls(connection)

    @property
    def supervised(self) -> bool:
        """Whether a supervisor started this worker."""
        return self._channel is not None

    def send(self, message_type: str, **fields: Any) -> None:
        """Send one message, now or as soon as the supervisor reads. Never blocks, never raises."""
        if self._channel is None:
            return
        self._channel.send(message_type, **fields)
        self._watch_output()

    def hand_over(self, message_type: str, descriptors: Sequence[int], **fields: Any) -> bool:
        """Send copies of descriptors to the supervisor; return False if there is none, or it does not take them."""
        return self._channel is not None and self._channel.send_descriptors(message_type, descriptors, **fields)

    def offer_stack(self) -> None:
        """Let the supervisor have the main thread's stack at any time, also while native code holds the GIL."""
        if self._channel is None:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)  # what does not fit is lost: the thread must not wait
        if self.hand_over(STACK, [reader]):
            faulthandler.register(STACK_SIGNAL, file=writer, all_threads=False)
        else:
            os.close(writer)
        os.close(reader)

    def listen(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[dict[str, Any]], None]) -> None:
        """Call ``on_message`` on the loop for every message from the supervisor."""
        if self._channel is None:
            return
        self._loop = loop
        loop.add_reader(self._channel.socket.fileno(), self._receive, on_message)
        self._watch_output()

    def _receive(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        assert self._channel is not None
        assert self._loop is not None
        for message in self._channel.receive():
            on_message(message)
        if self._channel.closed:
            # The supervisor died. The guardian notices, too, and ends this process.
            self._loop.remove_reader(self._channel.socket.fileno())
            self._watch_output()

    def _watch_output(self) -> None:
        """Send pending messages as soon as the supervisor reads again."""
        assert self._channel is not None
        wanted = bool(self._channel.pending) and not self._channel.deaf
        if self._loop is None or wanted == self._waiting:
            return
        self._waiting = wanted
        if wanted:
            self._loop.add_writer(self._channel.socket.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._channel.socket.fileno())

    def _flush(self) -> None:
        assert self._channel is not None
        self._channel.flush()
        self._watch_output()
