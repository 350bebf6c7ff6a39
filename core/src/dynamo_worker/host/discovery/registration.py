"""Keeps this worker's entries in discovery: restores those that vanish without the worker having removed them.

The runtime refreshes its entries, but never creates one again (measured on 1.6.1): a worker that was stopped for 14 s,
or had no descriptor left to refresh a file, would stay healthy and get no requests forever.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote

from dynamo_worker.errors import DiscoveryLostError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.discovery import etcd_headers, post
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from dynamo_worker.errors import WorkerError

log = get_logger(__name__)

_T = TypeVar("_T")

#: Seconds between checks of files, and of etcd.
_FILE_INTERVAL = 1.0
_ETCD_INTERVAL = 5.0
#: Seconds before a lost entry is restored. The supervisor withdraws a worker whose loop hangs and kills it 1 s later:
#: one that recovers in between must not register again.
_CONFIRM = 1.5
#: Seconds for discovery to answer. With every backend, entries expire ten seconds after their last refresh.
_PATIENCE = 10.0
#: Where both backends keep the entries of endpoints.
_INSTANCES = "v1/instances/"
#: Seconds for one endpoint of etcd to answer.
_ETCD_TIMEOUT = 2.0
#: Age in seconds at which files are refreshed here. The runtime does so every 3.3 s (measured on 1.6.1).
_OVERDUE = 5.0
#: Seconds that leaving discovery waits for a check in progress.
_CLOSE = 0.3
#: Seconds for the worker's entries to appear, and between checks of that.
_ENTER = 5.0
_ENTER_INTERVAL = 0.02
#: Longest file in bytes that counts as an entry; model cards have some kilobytes.
_MOST_BYTES = 4 << 20
#: A draft is always a new file.
_DRAFT_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Store(Protocol):
    """A discovery backend's storage. Every method may block and raise OSError, and only one runs at a time.

    :ivar interval: seconds between checks.
    """

    interval: float

    @property
    def count(self) -> int:
        """The number of expected entries."""

    def adopt(self, lost: Collection[str]) -> None:
        """Expect the entries that exist now, and those that were ``lost``."""

    def missing(self) -> list[str]:
        """Return the expected entries that do not exist."""

    def restore(self, names: Collection[str]) -> None:
        """Write entries again as they were."""

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint ``namespace/component/name`` that an entry stands for; None for other entries."""

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""


class _File(NamedTuple):
    inode: int
    content: bytes


class FileStore:
    """The entries of the ``file`` backend: all files below a directory whose names contain the instance id."""

    interval = _FILE_INTERVAL

    def __init__(self, root: str, instance: str) -> None:
        self._root = root
        self._instance = instance
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
        if os.path.relpath(directory, self._root) != _INSTANCES.rstrip("/"):
            return None
        return unquote(entry).rpartition("/")[0]

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""
        self._closed = True

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


def _raise(error: OSError) -> None:
    raise error


class EtcdStore:
    """The entries of the ``etcd`` backend: all keys of the worker's lease, read through etcd's HTTP gateway.

    An etcd that does not answer is ignored: the runtime keeps the lease, and shuts down when it is lost.
    """

    interval = _ETCD_INTERVAL

    def __init__(self, endpoints: Sequence[str], lease: int) -> None:
        self._endpoints = list(endpoints)
        self._lease = str(lease)
        self._headers: dict[str, str] | None = None
        self._values: dict[str, str] = {}
        self._closed = False

    @property
    def count(self) -> int:
        """The number of expected keys."""
        return len(self._values)

    def adopt(self, lost: Collection[str]) -> None:
        """Expect the entries that exist now, and those that were ``lost``."""
        there = self._keys()
        if there is not None:
            kept = {key: self._values[key] for key in lost if key not in there}
            self._values = {**kept, **{key: self._value(key) for key in there}}

    def missing(self) -> list[str]:
        """Return the expected keys that do not exist although the lease does."""
        try:
            there = self._keys()
            if there is None:
                return []
            for key in there.difference(self._values):
                self._values[key] = self._value(key)
        except OSError as error:
            log.debug("Cannot check registration", error=error)
            return []
        return [key for key in self._values if key not in there]

    def restore(self, names: Collection[str]) -> None:
        """Write keys again as they were, the instance (``v1/instances``) before the models (``v1/mdc``)."""
        for key in sorted(names, key=base64.b64decode):
            if not self._closed:
                self._call("/v3/kv/put", {"key": key, "value": self._values[key], "lease": self._lease})

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint ``namespace/component/name`` that an entry stands for; None for other entries."""
        key = base64.b64decode(name).decode(errors="replace")
        return key.removeprefix(_INSTANCES).rpartition("/")[0] if key.startswith(_INSTANCES) else None

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""
        self._closed = True

    def _keys(self) -> set[str] | None:
        """Return the keys of the lease; None if it has ended."""
        answer = self._call("/v3/lease/timetolive", {"ID": self._lease, "keys": True})
        return set(answer.get("keys", ())) if int(answer.get("TTL", -1)) > 0 else None

    def _value(self, key: str) -> str:
        found = self._call("/v3/kv/range", {"key": key}).get("kvs", ())
        if not found:  # removed meanwhile; never restore what was not read
            raise OSError(f"etcd: the key {base64.b64decode(key).decode(errors='replace')} cannot be read")
        return str(found[0].get("value", ""))

    def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the endpoint that answered last, then each of the others once; renew an expired token."""
        failures = []
        for endpoint in list(self._endpoints):
            try:
                if self._headers is None:
                    self._headers = etcd_headers(endpoint, _ETCD_TIMEOUT)
                status, answer = post(endpoint, path, body, self._headers, _ETCD_TIMEOUT)
                if status == 200:
                    return answer
                failures.append(f"{endpoint}: {answer.get('message', status)}")
            except (OSError, HTTPException) as error:
                failures.append(f"{endpoint}: {error}")
            self._headers = None
            self._endpoints.append(self._endpoints.pop(0))
        raise OSError(f"etcd: {'; '.join(failures)}")


class Registration:
    """Keeps the entries of one worker in discovery.

    :ivar problem: why the worker is out of discovery although it did not leave; None if it is not.
    :ivar withdrawn: the endpoints ``namespace/component/name`` that the worker keeps out on purpose.
    """

    def __init__(self, store: Store, on_fatal: Callable[[WorkerError], None], *, timeout: float) -> None:
        """Watch ``store`` once :meth:`run` is called.

        :param on_fatal: called when the worker has been out of discovery for ``timeout`` seconds.
        """
        self.problem: str | None = None
        self.withdrawn: Collection[str] = ()
        self._store = store
        self._on_fatal = on_fatal
        self._timeout = timeout
        self._out_for = 0.0
        #: Entries lost before the existing ones become the expected ones; None once they are.
        self._unadopted: list[str] | None = []
        self._lock = asyncio.Lock()
        self._closed = False
        # A separate thread: discovery may hang, for example in a dead network file system.
        self._executor = ThreadPoolExecutor(1, "registration")
        self._call: asyncio.Future[Any] | None = None

    async def run(self) -> None:
        """Watch until closed or cancelled, or until restoring the entries has failed for too long."""
        checked = time.monotonic()
        while not self._closed:
            out = self.problem is not None
            async with self._lock:
                try:
                    await self._adopt()
                    await self._check()
                except OSError as error:
                    if self._unadopted is None:  # otherwise nothing is known to be lost
                        self._out(_reason(error))
            # Time in which this process did not run does not count.
            passed, checked = min(time.monotonic() - checked, _PATIENCE + _CONFIRM), time.monotonic()
            if out:  # it has tried to restore its entries
                self._out_for += passed
            if self.problem is None:
                if out:
                    log.warning("In discovery again", out_s=self._out_for)
                self._out_for = 0.0
            elif self._out_for >= self._timeout and not self._closed:
                self._on_fatal(
                    DiscoveryLostError(
                        f"the worker is out of discovery and could not register again within {self._timeout:g} s: "
                        f"{self.problem}"
                    )
                )
                return
            await asyncio.sleep(self._store.interval if self.problem is None else _CONFIRM)

    async def entered(self, count: int) -> bool:
        """Wait some seconds for ``count`` entries to exist and be known; return whether they are.

        The runtime does not report it: it registers endpoints some time after the call that serves them.
        """
        give_up = time.monotonic() + _ENTER
        while True:
            async with self._lock:
                with contextlib.suppress(OSError):
                    self._unadopted = []
                    await self._adopt()
            if self._store.count >= count:
                return True
            if time.monotonic() > give_up:
                return False
            await asyncio.sleep(_ENTER_INTERVAL)

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[set[str]]:
        """Take changes inside this block for the worker's own; the entries afterwards are the expected ones.

        Yields the endpoints whose entries have vanished. Those in :attr:`withdrawn` are not restored.
        """
        async with self._lock:
            lost: list[str] = []
            with contextlib.suppress(OSError):
                lost = await self._ask(self._store.missing)
            endpoints = {name: self._store.endpoint(name) for name in lost}
            try:
                yield {endpoint for endpoint in endpoints.values() if endpoint is not None}
            finally:
                self._unadopted = [name for name in lost if endpoints[name] not in self.withdrawn]
                with contextlib.suppress(OSError):  # tried again before the next check
                    await self._adopt()

    async def close(self) -> None:
        """Stop watching: the worker is about to leave discovery for good."""
        self._closed = True
        self._store.close()
        if self._call is not None:
            await asyncio.wait({self._call}, timeout=_CLOSE)
        self._executor.shutdown(wait=False)

    async def _adopt(self) -> None:
        """Expect the entries that exist now, and those that vanished before the worker changed any."""
        lost = self._unadopted
        if lost is not None:
            await self._ask(lambda: self._store.adopt(lost))
            self._unadopted = None

    async def _check(self) -> None:
        missing = await self._ask(self._store.missing)
        if missing and self.problem is None:
            self._out(f"{len(missing)} of its entries have vanished")
            return
        if missing:
            await self._ask(lambda: self._store.restore(missing))
            missing = await self._ask(self._store.missing)
        if not missing:
            self.problem = None

    def _out(self, problem: str) -> None:
        if problem != self.problem and not self._closed:
            log.warning("Out of discovery; registering again", reason=problem, timeout_s=self._timeout)
        self.problem = problem

    async def _ask(self, function: Callable[[], _T]) -> _T:
        """Call a method of the store in the thread.

        :raises OSError: it failed, or discovery does not answer.
        """
        if self._closed:
            raise ConnectionAbortedError("the worker is leaving discovery")
        if self._call is not None and not self._call.done():
            await self._wait(self._call)  # an earlier call that hung
        try:
            future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        except RuntimeError as error:  # no thread can be started
            raise OSError(str(error)) from error
        future.add_done_callback(lambda call: call.cancelled() or call.exception())  # it may not be awaited any more
        self._call = future
        await self._wait(future)
        return future.result()

    @staticmethod
    async def _wait(call: asyncio.Future[Any]) -> None:
        done, _ = await asyncio.wait({call}, timeout=_PATIENCE)
        if not done:
            raise TimeoutError(f"discovery has not answered for {_PATIENCE:g} s")


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text
