"""The entries of a worker in the ``file`` discovery backend."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from dynamo_worker.host.discovery.card_check import CARDS, MOST_CARDS
from dynamo_worker.host.discovery.publishers import CHANNELS
from dynamo_worker.host.discovery.store import INSTANCES
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Collection

    from dynamo_worker.host.discovery.publishers import OwnPublishers

#: Seconds between checks.
_INTERVAL = 1.0
#: Age in seconds at which files are refreshed here. The runtime does so every 3.3 s (measured on 1.6.1).
_OVERDUE = 5.0
#: Longest file in bytes that counts as an entry; model cards have some kilobytes.
_MOST_BYTES = 4 << 20
#: A draft is always a new file.
_DRAFT_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class _File(NamedTuple):
    inode: int
    content: bytes


class FileStore:
    """The entries of the ``file`` backend: all files below a directory whose names contain the instance id.

    :param publishers: is shown the announcements of event publishers, whose names contain other ids. They are not
        restored, because the runtime may remove them at any time.
    """

    interval = _INTERVAL

    def __init__(self, root: str, instance: str, publishers: OwnPublishers | None = None) -> None:
        self._root = root
        self._instance = instance
        self._publishers = publishers
        self._files: dict[str, _File] = {}
        self._directories = [root]
        self._modified: dict[str, int] = {}
        self._settled = False
        self._closed = False

    @property
    def count(self) -> int:
        """The number of expected entries."""
        return len(self._files)

    def adopt(self, lost: Collection[str]) -> None:
        """Expect the entries that exist now, and those that were ``lost``."""
        self._learn()
        self._files = {path: file for path, file in self._files.items() if path in lost or os.path.exists(path)}

    def missing(self) -> list[str]:
        """Return the expected entries that do not exist; refresh those that the runtime neglects."""
        # Without a free descriptor nothing can be read, but files can still be refreshed.
        with contextlib.suppress(OSError):
            self._learn_new()
        return [path for path in self._files if not self._alive(path)]

    def restore(self, names: Collection[str]) -> None:
        """Write entries again as they were, the instance (``v1/instances``) before the models (``v1/mdc``)."""
        for path in sorted(names):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Written outside the directories that routers watch: they must not see half a file. Its name contains the
            # instance id, so it is removed with the other files if this process dies here.
            draft = os.path.join(self._root, f".tmp_{self._instance}")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            with open(os.open(draft, _DRAFT_FLAGS, 0o600), "wb") as file:
                file.write(self._files[path].content)
            if self._closed:
                os.unlink(draft)
                return
            os.rename(draft, path)
        self._learn()

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint ``namespace/component/name`` that an entry stands for; None for other entries."""
        directory, entry = os.path.split(name)
        if os.path.relpath(directory, self._root) != INSTANCES.rstrip("/"):
            return None
        return unquote(entry).rpartition("/")[0]

    def cards(self) -> tuple[list[bytes], list[bytes]]:
        """Return this worker's entries with model cards, and those of some other workers of the same endpoints."""
        directory = os.path.join(self._root, CARDS)
        own = {path: file.content for path, file in self._files.items() if path.startswith(directory)}
        endpoints = {_endpoint_of(path) for path in own}
        others: list[bytes] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.path in own or _endpoint_of(entry.path) not in endpoints or len(others) == MOST_CARDS:
                    continue
                with (
                    contextlib.suppress(OSError),  # removed meanwhile
                    open(open_regular(entry.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file,
                ):
                    others.append(file.read(_MOST_BYTES))
        return list(own.values()), others

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""
        self._closed = True

    def release(self) -> None:
        """Do nothing: the runtime removes all of its files."""

    def _alive(self, path: str) -> bool:
        try:
            modified = os.stat(path).st_mtime
        except OSError:
            return False
        if time.time() - modified > _OVERDUE:
            with contextlib.suppress(OSError):
                os.utime(path)  # needs no descriptor; the runtime may have none left
        return True

    def _learn_new(self) -> None:
        """Look for new files when a directory has changed, and once more later: its timestamps are coarse."""
        modified = {}
        for directory in self._directories:
            with contextlib.suppress(OSError):
                modified[directory] = os.stat(directory).st_mtime_ns
        if modified != self._modified or not self._settled:
            self._settled = modified == self._modified
            self._modified = modified
            self._learn()

    def _learn(self) -> None:
        """Read every file of this worker that is new or was replaced."""
        directories = []
        for directory, _, names in os.walk(self._root, onerror=_raise):
            directories.append(directory)
            if self._publishers is not None and os.path.relpath(directory, self._root) == CHANNELS:
                with contextlib.suppress(OSError):  # without descriptors or room; they end with their lease then
                    self._publishers.look(directory, names)
            for name in names:
                if self._instance not in name or name.startswith("."):
                    continue
                path = os.path.join(directory, name)
                known = self._files.get(path)
                try:
                    status = os.lstat(path)
                    if known is not None and known.inode == status.st_ino:
                        continue
                    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:  # not the runtime's
                        continue
                    with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                        self._files[path] = _File(os.fstat(file.fileno()).st_ino, file.read(_MOST_BYTES))
                except FileNotFoundError:  # removed meanwhile
                    continue
        self._directories = directories


def _endpoint_of(path: str) -> str:
    """Return the endpoint ``namespace/component/name`` that the model card in a file belongs to."""
    return "/".join(unquote(os.path.basename(path)).split("/")[:3])


def _raise(error: OSError) -> None:
    raise error
