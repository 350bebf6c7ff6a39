"""The worker's end of the channel to its supervisor: JSON objects, one per packet, both ways."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

from dynamo_worker.contract import CONTROL_FD
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

log = get_logger(__name__)

#: Largest message; the supervisor's are a few hundred bytes.
_MAX_PACKET = 64 * 1024


class ControlChannel:
    """Sends states, heartbeats and the reason of the end to the supervisor; receives stop requests from it.

    Without a supervisor (``--no-supervise``) every send does nothing and nothing is received.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._socket = connection
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_environment(cls) -> ControlChannel:
        """Take over the channel that the supervisor left in the environment, once: children must not inherit it."""
        descriptor = os.environ.pop(CONTROL_FD, None)
        if descriptor is None:
            return cls(None)
        connection = socket.socket(fileno=int(descriptor))
        connection.set_inheritable(False)
        connection.setblocking(False)
        return cls(connection)

    @property
    def supervised(self) -> bool:
        """Whether there is a supervisor at the other end."""
        return self._socket is not None

    def send(self, message_type: str, **fields: Any) -> None:
        """Send one message; never blocks and never raises (a supervisor that is gone cannot be told anything)."""
        if self._socket is None:
            return
        try:
            self._socket.send(json.dumps({"type": message_type, **fields}).encode())
        except OSError as error:
            log.debug("Supervisor not reachable", error=error)

    def listen(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[dict[str, Any]], None]) -> None:
        """Call ``on_message`` on the loop for every message from the supervisor."""
        if self._socket is None:
            return
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self._receive, on_message)

    def _receive(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        assert self._socket is not None
        assert self._loop is not None
        try:
            packet = self._socket.recv(_MAX_PACKET)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            # The supervisor is gone. The guardian sees that too and ends this process; nothing to do here.
            self._loop.remove_reader(self._socket.fileno())
            return
        message = json.loads(packet)
        if isinstance(message, dict):
            on_message(message)
