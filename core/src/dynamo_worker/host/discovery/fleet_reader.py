"""Reads the entries of all workers from a discovery backend, for those who only look."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from dynamo_worker.errors import UsageError
from dynamo_worker.host.discovery.card_check import CARDS, from_base64
from dynamo_worker.host.discovery.fleet import Entry
from dynamo_worker.host.discovery.store import INSTANCES
from dynamo_worker.supervisor import kubernetes
from dynamo_worker.supervisor.etcd import Gateway, etcd_endpoints
from dynamo_worker.supervisor.files import open_regular
from dynamo_worker.supervisor.protocol import DEFAULT_FILE_KV

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds for discovery to answer everything.
_TIMEOUT: Final = 5.0
#: Most entries that are read.
MOST_ENTRIES: Final = 20_000
#: Keys that are read with one request, and custom resources: answers are cut after 4 MiB.
_KEYS_AT_ONCE: Final = 200
_RESOURCES_AT_ONCE: Final = 50
#: Longest file in bytes that counts as an entry; model cards have some kilobytes.
_MOST_BYTES: Final = 1 << 20
_KINDS: Final = ((False, INSTANCES), (True, CARDS))
_GROUPS: Final = ((False, "endpoints"), (True, "model_cards"))


class FleetReader:
    """Reads the entries of workers in some namespaces. Writes nothing.

    :ivar place: where it looks, for messages.
    """

    def __init__(self, backend: str, path: str | None = None) -> None:
        """Read from a backend of discovery, ``file``, ``etcd`` or ``kubernetes``.

        :param path: the directory of the ``file`` backend; None for that of the runtime.
        :raises UsageError: this process has no access to it.
        """
        readers: dict[str, tuple[str, Callable[[str], Iterator[Entry]]]] = {
            "file": (self._directory(path), self._files),
            "etcd": (", ".join(etcd_endpoints()), self._keys),
            "kubernetes": (kubernetes.address(), self._resources),
        }
        self.place, self._entries = readers[backend]
        self.place = f"{backend}: {self.place}"
        self._root = self._directory(path)
        if backend == "kubernetes" and not kubernetes.in_cluster():
            raise UsageError(
                "discovery through Kubernetes can be read in a pod only",
                hint="kubectl exec POD -- dynamo-worker top, in any pod of a worker or a frontend",
            )

    def read(self, prefix: str) -> list[Entry]:
        """Return the entries in namespaces that begin with ``prefix``, :data:`MOST_ENTRIES` at most. Blocks.

        :raises OSError: discovery does not answer, or refuses.
        """
        return list(itertools.islice(self._entries(prefix), MOST_ENTRIES))

    @staticmethod
    def _directory(path: str | None) -> str:
        return path or os.environ.get("DYN_FILE_KV") or DEFAULT_FILE_KV

    def _files(self, prefix: str) -> Iterator[Entry]:
        os.stat(self._root)
        for is_card, directory in _KINDS:
            with contextlib.suppress(FileNotFoundError), os.scandir(os.path.join(self._root, directory)) as files:
                for file in files:
                    name = unquote(file.name)
                    if name.startswith(prefix):
                        # Not those that vanish meanwhile, or that others have put there.
                        with contextlib.suppress(OSError), open(open_regular(file.path, os.O_RDONLY), "rb") as opened:
                            yield Entry(is_card, name, _decoded(opened.read(_MOST_BYTES)))

    def _keys(self, prefix: str) -> Iterator[Entry]:
        gateway = Gateway(etcd_endpoints(), _TIMEOUT, time.monotonic() + _TIMEOUT)
        for is_card, directory in _KINDS:
            key = f"{directory}{prefix}".encode()
            end = key[:-1] + bytes([key[-1] + 1])
            while True:
                bounds = {"key": base64.b64encode(key).decode(), "range_end": base64.b64encode(end).decode()}
                answer = gateway.call("/v3/kv/range", {**bounds, "limit": _KEYS_AT_ONCE})
                found = answer.get("kvs") or []
                for item in found:
                    key = from_base64(str(item.get("key", "")))
                    name = key.decode("utf-8", "replace").removeprefix(directory)
                    yield Entry(is_card, name, _decoded(from_base64(str(item.get("value", "")))))
                if not found or not answer.get("more"):
                    break
                key += b"\0"

    def _resources(self, prefix: str) -> Iterator[Entry]:
        deadline, after = time.monotonic() + _TIMEOUT, ""
        while True:
            items, after = kubernetes.page(_RESOURCES_AT_ONCE, after, deadline)
            for data in map(_data_of, items):
                for is_card, group in _GROUPS:
                    entries = data.get(group)
                    for name, content in entries.items() if isinstance(entries, dict) else ():
                        if name.startswith(prefix):
                            yield Entry(is_card, name, content)
            if not after:
                return


def _data_of(resource: object) -> dict[str, Any]:
    """Return what a custom resource holds; nothing if it is not the runtime's."""
    for name in ("spec", "data"):
        resource = resource.get(name) if isinstance(resource, dict) else None
    return resource if isinstance(resource, dict) else {}


def _decoded(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
