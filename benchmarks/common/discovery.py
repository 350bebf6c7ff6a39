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
_DIRECTORIES = ("instances", "mdc")
#: The endpoint that requests come to. Workers have others beside it, some of which stay while requests are in flight.
_SERVES = "generate"
_EVENT = struct.Struct("iIII")


class DiscoveryWatch:
    """Records with inotify when workers enter and leave the file discovery.

    A worker has two entries: one as an instance, by which routers find it, and one as the server of a model. The
    first is what counts for leaving; the second may stay until the end of the process, but no longer. The same is true
    of the further endpoints that some workers have.

    :param root: directory of the file discovery; made here if it is not there yet.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        for name in _DIRECTORIES:
            (root / "v1" / name).mkdir(parents=True, exist_ok=True)
        mask = _IN_CREATE | _IN_MOVED_TO | _IN_DELETE | _IN_MOVED_FROM
        directory = bytes(root / "v1" / _DIRECTORIES[0])
        if self._descriptor < 0 or self._libc.inotify_add_watch(self._descriptor, directory, mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        self._condition = threading.Condition()
        self._vanished: dict[str, float] = {}
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._read, name="discovery watch", daemon=True)
        self._thread.start()

    def instances(self, component: str) -> list[str]:
        """Return the ids of the instances of a component that are registered now with their model."""
        registered = [self._ids(name, component) for name in _DIRECTORIES]
        return sorted(set.intersection(*registered))

    def wait_vanished(self, instance: str, timeout: float) -> float | None:
        """Wait until an instance has vanished; return since when, None when it is still there in the end."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while True:
                at = self._vanished.get(instance)
                remaining = deadline - time.monotonic()
                if at is not None or remaining <= 0:
                    return at
                self._condition.wait(remaining)

    def entries(self, instance: str) -> list[Path]:
        """Return all entries of an instance that are there now."""
        return [
            path
            for name in _DIRECTORIES
            for path in (self._root / "v1" / name).iterdir()
            if _parts(path.name)[-1] == instance
        ]

    def withdraw(self, instance: str) -> None:
        """Remove what a killed worker has left here, as if its time to live were over."""
        for path in self.entries(instance):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop watching."""
        os.write(self._wake_write, b"x")
        self._thread.join()
        for descriptor in (self._descriptor, self._wake_read, self._wake_write):
            os.close(descriptor)

    def _ids(self, directory: str, component: str) -> set[str]:
        parts = [_parts(name) for name in os.listdir(self._root / "v1" / directory)]
        return {entry[3] for entry in parts if len(entry) == 4 and entry[1] == component}

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
                    *path, instance = _parts(name)
                    if path[-1:] != [_SERVES]:
                        continue
                    if mask & (_IN_CREATE | _IN_MOVED_TO):
                        self._vanished.pop(instance, None)
                    else:
                        self._vanished[instance] = now
                self._condition.notify_all()


def _parts(name: str) -> list[str]:
    """Return the parts of an entry's file name: the quoted `namespace/component/endpoint/id`."""
    return urllib.parse.unquote(name).split("/")


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
            found = (model in self.names()) == present
            now = time.monotonic()
            if found:
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
