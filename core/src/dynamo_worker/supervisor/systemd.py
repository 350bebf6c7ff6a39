"""Notifies systemd (``sd_notify``): ready, alive, stopping, or more time needed."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.worker_status import ENDING

if TYPE_CHECKING:
    from dynamo_worker.supervisor.worker_status import WorkerStatus

#: Seconds between two requests for more time during a start.
_EXTEND_INTERVAL: Final = 10.0


class Systemd:
    """The connection to systemd; does nothing without ``$NOTIFY_SOCKET``."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        #: Seconds between two keep-alives for systemd's watchdog; None without one.
        self.watchdog_interval: float | None = None
        self._next_watchdog = 0.0
        self._next_extension = 0.0
        self._ready = False
        if self._address[:1] not in ("/", "@"):
            return
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError:
            return
        if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(KeyError, ValueError):
                self.watchdog_interval = int(os.environ["WATCHDOG_USEC"]) / 2e6 or None

    @property
    def active(self) -> bool:
        """Whether systemd listens."""
        return self._socket is not None

    def send(self, *assignments: str) -> None:
        """Send assignments such as ``READY=1``. A listener that is gone or full is not an error."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(assignments).encode("utf-8", "replace"), self._address)

    def report(self, status: WorkerStatus) -> None:
        """Pass on the state that the worker has just announced."""
        drain = f", {status.drain} on request" if status.drain and status.state is State.SERVING else ""
        text = f"STATUS={status.state}{drain}, {status.in_flight} in flight"
        if status.state is State.SERVING and not self._ready:
            self._ready = True
            self.send("READY=1", text)
        elif status.state in ENDING:
            self.send("STOPPING=1", text)
        else:
            self.send(text)

    def stopping(self, signal_name: str, seconds: float) -> None:
        """Report that a signal is stopping the worker, and request the time that takes.

        :param seconds: the time, from now.
        """
        self.send("STOPPING=1", f"STATUS=stopping after {signal_name}", f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}")

    @property
    def watchdog_due(self) -> float | None:
        """When the next keep-alive is due (monotonic); None without a watchdog."""
        return self._next_watchdog if self.watchdog_interval is not None else None

    def due(self, state: State) -> float | None:
        """Return when ``tick`` should be called next (monotonic), or None."""
        extension = self._next_extension if self.active and state is State.STARTING else None
        return min((time for time in (self.watchdog_due, extension) if time is not None), default=None)

    def tick(self, now: float, state: State, *, responsive: bool) -> None:
        """Send a keep-alive to the watchdog if one is due, and request more time during a start.

        :param responsive: whether to send the keep-alive.
        """
        if self.watchdog_interval is not None and now >= self._next_watchdog:
            self._next_watchdog = now + self.watchdog_interval
            if responsive:
                self.send("WATCHDOG=1")
        if self.active and state is State.STARTING and now >= self._next_extension:
            self._next_extension = now + _EXTEND_INTERVAL
            self.send(f"EXTEND_TIMEOUT_USEC={3 * _EXTEND_INTERVAL * 1e6:.0f}")

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
