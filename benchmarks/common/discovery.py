"""When workers enter and leave discovery, seen from outside: the file discovery's directory and the frontend's list."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import select
import struct
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_IN_CREATE, _IN_MOVED_TO = 0x100, 0x80
_IN_DELETE, _IN_MOVED_FROM = 0x200, 0x40
_EVENT = struct.Struct("iIII")


class DiscoveryWatch:
    """Records with inotify when instances appear in the file discovery and when they vanish.

    :param root: directory of the file discovery; made here if it is not there yet.
    """

    def __init__(self, root: Path) -> None:
        self._directory = root / "v1" / "instances"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        mask = _IN_CREATE | _IN_MOVED_TO | _IN_DELETE | _IN_MOVED_FROM
        if self._descriptor < 0 or self._libc.inotify_add_watch(self._descriptor, bytes(self._directory), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        self._condition = threading.Condition()
        self._appeared: dict[str, float] = {}
        self._vanished: dict[str, float] = {}
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._read, name="discovery watch", daemon=True)
        self._thread.start()

    def instances(self, component: str) -> list[str]:
        """Return the names of the instances of a component that are registered now, oldest first."""
        with self._condition:
            present = [name for name in os.listdir(self._directory) if _component(name) == component]
            return sorted(present, key=lambda name: self._appeared.get(name, 0.0))

    def vanished_at(self, instance: str) -> float | None:
        """Return when an instance vanished; None while it is there."""
        with self._condition:
            at = self._vanished.get(instance)
            return at if at is not None and at >= self._appeared.get(instance, 0.0) else None

    def wait_vanished(self, instance: str, timeout: float) -> float | None:
        """Wait until an instance has vanished; return when, None when it is still there after the timeout."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while True:
                at = self.vanished_at(instance)
                remaining = deadline - time.monotonic()
                if at is not None or remaining <= 0:
                    return at
                self._condition.wait(remaining)

    def close(self) -> None:
        """Stop watching."""
        os.write(self._wake_write, b"x")
        self._thread.join()
        for descriptor in (self._descriptor, self._wake_read, self._wake_write):
            os.close(descriptor)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor, self._wake_read], [], [])
            if self._wake_read in ready:
                return
            now = time.monotonic()
            data = os.read(self._descriptor, 1 << 16)
            with self._condition:
                position = 0
                while position < len(data):
                    _, mask, _, length = _EVENT.unpack_from(data, position)
                    position += _EVENT.size
                    name = os.fsdecode(data[position : position + length].rstrip(b"\0"))
                    position += length
                    if mask & (_IN_CREATE | _IN_MOVED_TO):
                        self._appeared.setdefault(name, now)
                        self._vanished.pop(name, None)
                    else:
                        self._vanished[name] = now
                self._condition.notify_all()


def _component(name: str) -> str:
    """Return the component of an instance's file name: the quoted `namespace/component/endpoint/id`."""
    parts = urllib.parse.unquote(name).split("/")
    return parts[1] if len(parts) == 4 else ""


class FrontendModels:
    """The frontend's `/v1/models`, over one connection that is kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: http.client.HTTPConnection | None = None

    def names(self) -> set[str]:
        """Return the models that the frontend offers now; none while it cannot be reached."""
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
            self._connection.request("GET", "/v1/models")
            answer = json.loads(self._connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            self.close()
            return set()
        return {entry["id"] for entry in answer["data"]}

    def wait(self, model: str, present: bool, timeout: float, interval: float = 0.002) -> float | None:
        """Wait until the frontend offers a model, or no longer does; return when, None after the timeout."""
        deadline = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            if (model in self.names()) == present:
                return now
            if now > deadline:
                return None
            time.sleep(interval)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class VanishedModel:
    """Looks in a thread when the frontend stops offering a model."""

    def __init__(self, port: int, model: str, timeout: float) -> None:
        self.at: float | None = None
        self._models = FrontendModels(port)
        self._thread = threading.Thread(target=self._wait, args=(model, timeout), daemon=True)
        self._thread.start()

    def _wait(self, model: str, timeout: float) -> None:
        self.at = self._models.wait(model, False, timeout)
        self._models.close()

    def join(self) -> float | None:
        """Wait for the answer."""
        self._thread.join()
        return self.at
