"""The door of the worker's status server: answers the liveness probe, also while the worker's event loop is blocked.

The worker listens and hands its listening socket over. The supervisor reads just enough of each request to know
whether it is the probe, and passes all other connections on to the worker, with what it has read.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_worker.supervisor.loop import Loop

#: Largest request head in bytes that is read here, as in the status server.
_MAX_HEAD = 16 * 1024
#: Seconds for a client to send enough of its request.
_HEAD_TIMEOUT = 10.0
#: Most connections that have not sent enough yet. One more closes the oldest, so that clients that never finish neither
#: keep a probe from its answer nor use up our descriptors.
_MOST_SILENT = 64
#: Connections accepted in one go: a flood must not keep us from signals and timers.
_MOST_AT_ONCE = 64
#: Seconds until the next try after a connection could not be accepted.
_PAUSE = 0.1


@dataclass
class _Client:
    connection: socket.socket
    give_up_at: float
    data: bytearray = field(default_factory=bytearray)


class LiveProbe:
    """Accepts the connections to the worker's status server, once the worker has handed its sockets over.

    :param state: returns the worker's state.
    :param watched: returns whether a blocked worker would be noticed. Otherwise only the probe can notice it, and the
        worker has to answer.
    """

    def __init__(self, loop: Loop, state: Callable[[], str], watched: Callable[[], bool]) -> None:
        self._loop = loop
        self._state = state
        self._watched = watched
        self._listener: socket.socket | None = None
        self._worker: socket.socket | None = None
        self._path = b""
        self._paused_until: float | None = None
        # In order of arrival, by descriptor.
        self._silent: dict[int, _Client] = {}
        # In order of arrival: those for the worker, which has not taken all of the earlier ones yet.
        self._waiting: deque[_Client] = deque()
        self._stalled = False
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_silent = _MOST_SILENT if limit < 0 else min(_MOST_SILENT, limit // 4)

    def open(self, descriptors: Sequence[int], path: str) -> None:
        """Take over the listening socket and our end of the pair that leads to the worker.

        :param path: path of the liveness probe.
        :raises OSError: these are no sockets.
        """
        self.close()
        self._listener, self._worker = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        self._listener.setblocking(False)
        self._worker.setblocking(False)
        self._path = path.encode("latin-1", "replace")
        self._loop.add(self._listener.fileno(), self._accept)
        self._loop.add(self._worker.fileno(), self._on_worker)

    def close(self) -> None:
        """Close the door: the port is free again, even if a helper process has inherited the socket."""
        for client in list(self._silent.values()):
            self._forget(client)
            client.connection.close()
        while self._waiting:
            self._waiting.popleft().connection.close()
        self._stalled = False
        for end in (self._listener, self._worker):
            if end is not None:
                self._loop.remove(end.fileno())
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._listener = self._worker = self._paused_until = None

    def next_timer(self) -> float | None:
        """Return when to call ``act_on_time`` (monotonic), or None."""
        oldest = next(iter(self._silent.values()), None)
        timers = (self._paused_until, None if oldest is None else oldest.give_up_at)
        return min((timer for timer in timers if timer is not None), default=None)

    def act_on_time(self) -> None:
        """Send clients away that take too long, and accept again after a pause."""
        now = time.monotonic()
        for client in [client for client in self._silent.values() if client.give_up_at <= now]:
            self._forget(client)
            self._answer(client.connection, "400 Bad Request", "notready")
        if self._paused_until is not None and self._paused_until <= now and self._listener is not None:
            self._paused_until = None
            self._loop.add(self._listener.fileno(), self._accept)

    def _on_worker(self) -> None:
        """Close the door when the worker closes its end; it never writes."""
        if self._worker is None:
            return
        with contextlib.suppress(BlockingIOError):
            self._worker.recv(1)
            self.close()

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            if self._listener is None:  # closed by an earlier event of the same batch
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is free, and the connection stays in the queue: no busy loop
                self._loop.remove(self._listener.fileno())
                self._paused_until = time.monotonic() + _PAUSE
                return
            connection.setblocking(False)
            client = _Client(connection, time.monotonic() + _HEAD_TIMEOUT)
            if not self._look(client):
                self._keep(client)

    def _keep(self, client: _Client) -> None:
        """Wait for more of a request; make room if too many connections wait."""
        while len(self._silent) >= self._most_silent:
            oldest = next(iter(self._silent.values()))
            self._forget(oldest)
            if not self._look(oldest):
                oldest.connection.close()
        descriptor = client.connection.fileno()
        self._silent[descriptor] = client
        self._loop.add(descriptor, lambda: self._on_input(client))

    def _forget(self, client: _Client) -> None:
        descriptor = client.connection.fileno()
        self._loop.remove(descriptor)
        self._silent.pop(descriptor, None)

    def _on_input(self, client: _Client) -> None:
        if self._silent.get(client.connection.fileno()) is not client:  # closed by an earlier event of the same batch
            return
        # Before the look, which closes the socket: a closed one has no descriptor.
        self._forget(client)
        if not self._look(client):
            descriptor = client.connection.fileno()
            self._silent[descriptor] = client
            self._loop.add(descriptor, lambda: self._on_input(client))

    def _look(self, client: _Client) -> bool:
        """Read what has arrived; return whether it was enough to answer the connection, hand it on or close it."""
        try:
            data = client.connection.recv(_MAX_HEAD - len(client.data))
        except BlockingIOError:
            return False
        except OSError:
            client.connection.close()
            return True
        client.data += data
        ours = _is_probe(bytes(client.data), self._path)
        if ours is None and data and len(client.data) < _MAX_HEAD:
            return False
        if ours and self._watched():
            self._answer(client.connection, "200 OK", "live")
        else:
            self._hand_on(client)
        return True

    def _hand_on(self, client: _Client) -> None:
        """Pass a connection on to the worker, now or as soon as it takes more; too many push the oldest out."""
        self._waiting.append(client)
        self._flush()
        if len(self._waiting) > self._most_silent:
            self._waiting.popleft().connection.close()

    def _flush(self) -> None:
        """Pass on as many connections as the worker takes, and wait for it to take the others."""
        if self._worker is None:
            return
        while self._waiting:
            client = self._waiting[0]
            try:
                if client.data:  # otherwise its client has left
                    socket.send_fds(self._worker, [bytes(client.data)], [client.connection.fileno()])
            except BlockingIOError:
                break
            except OSError:  # the worker is gone, or too many descriptors are on their way
                pass
            self._waiting.popleft().connection.close()
        if self._stalled != bool(self._waiting):
            self._stalled = not self._stalled
            self._loop.on_output(self._worker.fileno(), self._on_worker, self._flush if self._stalled else None)

    def _answer(self, connection: socket.socket, status: str, word: str) -> None:
        content = json.dumps({"status": word, "state": self._state()}).encode()
        lines = [
            f"HTTP/1.1 {status}",
            "content-type: application/json",
            f"content-length: {len(content)}",
            "connection: close",
        ]
        with contextlib.suppress(OSError):
            connection.send("\r\n".join([*lines, "", ""]).encode() + content)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(_MAX_HEAD)  # what is left unread would reset the connection, and the answer be lost
        connection.close()


def _is_probe(data: bytes, path: bytes) -> bool | None:
    """Return whether a request is the liveness probe, as the status server reads it; None if it is too early to say.

    Malformed heads are not: the status server refuses them.
    """
    line, end, _ = data.partition(b"\r\n")
    if not end:
        return None
    words = line.split(b" ", 2)
    if len(words) < 2 or words[1].split(b"?", 1)[0] != path:
        return False
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return None
    return not any(character in line for line in head.split(b"\r\n") for character in b"\r\n\0")
