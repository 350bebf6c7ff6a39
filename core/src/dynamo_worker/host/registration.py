"""Watches what this worker has in discovery, and puts it back when it vanishes without the worker's doing.

The runtime refreshes its entries by itself, but never makes one again (measured on 1.6.1): a worker that was stopped
for 14 s, or had no descriptor left to refresh a file with, would be healthy and without requests for ever.
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

from dynamo_worker.errors import DiscoveryLostError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.discovery import etcd_headers, post
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from dynamo_worker.errors import WorkerError

log = get_logger(__name__)

_T = TypeVar("_T")

#: Seconds between two looks at files, and at etcd.
_FILE_INTERVAL = 1.0
_ETCD_INTERVAL = 5.0
#: Seconds before a lost entry is put back. The supervisor withdraws a worker whose loop hangs, and kills it 1 s later:
#: one that comes to itself in between must not register again.
_CONFIRM = 1.5
#: Seconds that discovery may take to answer. Entries expire after ten without a refresh, with every backend.
_PATIENCE = 10.0
#: Seconds that one endpoint of etcd may take.
_ETCD_TIMEOUT = 2.0
#: The runtime refreshes files every 3.3 s (measured on 1.6.1). One that is older than this is refreshed here.
_OVERDUE = 5.0
#: Seconds that leaving discovery waits for a look that is under way.
_CLOSE = 0.3
#: Seconds that the worker's own entries may take until they are there, and between two looks at that.
_ENTER = 5.0
_ENTER_INTERVAL = 0.02
#: Longest file that is taken for an entry; models' cards have some kilobytes.
_MOST_BYTES = 4 << 20
#: A draft is a new file, whatever lies in the way.
_DRAFT_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Store(Protocol):
    """Where the entries are. Every method may block and raise OSError; never two at a time.

    :ivar interval: seconds between two looks.
    """

    interval: float

    @property
    def count(self) -> int:
        """How many entries should be there."""

    def adopt(self, lost: Collection[str]) -> None:
        """Take what is there, and what was ``lost``, for what should be there."""

    def missing(self) -> list[str]:
        """Return the entries that should be there and are not."""

    def restore(self, names: Collection[str]) -> None:
        """Put entries back as they were."""

    def close(self) -> None:
        """Restore nothing any more, not even when a call that hangs goes on."""


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
        """How many entries should be there."""
        return len(self._files)

    def adopt(self, lost: Collection[str]) -> None:
        """Take what is there, and what was ``lost``, for what should be there."""
        self._learn()
        self._files = {path: file for path, file in self._files.items() if path in lost or os.path.exists(path)}

    def missing(self) -> list[str]:
        """Return the entries that should be there and are not; refresh those that the runtime does not."""
        # Without a descriptor left there is nothing to learn, but the files can be looked after.
        with contextlib.suppress(OSError):
            self._learn_new()
        return [path for path in self._files if not self._alive(path)]

    def restore(self, names: Collection[str]) -> None:
        """Put entries back as they were, the instance (``v1/instances``) before the models (``v1/mdc``)."""
        for path in sorted(names):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Written outside of the directories that routers watch: they must not see half a file. The instance id in
            # the name has it removed with the rest if we die here.
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

    def close(self) -> None:
        """Restore nothing any more, not even when a call that hangs goes on."""
        self._closed = True

    def _alive(self, path: str) -> bool:
        try:
            modified = os.stat(path).st_mtime
        except OSError:
            return False
        if time.time() - modified > _OVERDUE:
            with contextlib.suppress(OSError):
                os.utime(path)  # needs no descriptor, which is what the runtime may be short of
        return True

    def _learn_new(self) -> None:
        """Look for new files where a directory has changed, and once more: its clock is coarse."""
        modified = {}
        for directory in self._directories:
            with contextlib.suppress(OSError):
                modified[directory] = os.stat(directory).st_mtime_ns
        if modified != self._modified or not self._settled:
            self._settled = modified == self._modified
            self._modified = modified
            self._learn()

    def _learn(self) -> None:
        """Read every file of ours that is new or was replaced."""
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
                    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:  # not of the runtime
                        continue
                    with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                        self._files[path] = _File(os.fstat(file.fileno()).st_ino, file.read(_MOST_BYTES))
                except FileNotFoundError:  # removed meanwhile
                    continue
        self._directories = directories


def _raise(error: OSError) -> None:
    raise error


class EtcdStore:
    """The entries of the ``etcd`` backend: all keys of the worker's lease, seen through etcd's HTTP gateway.

    An etcd that does not answer is no reason to worry: the runtime keeps the lease, and gives up when that is lost.
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
        """How many keys should be there."""
        return len(self._values)

    def adopt(self, lost: Collection[str]) -> None:
        """Take what is there, and what was ``lost``, for what should be there."""
        there = self._keys()
        if there is not None:
            kept = {key: self._values[key] for key in lost if key not in there}
            self._values = {**kept, **{key: self._value(key) for key in there}}

    def missing(self) -> list[str]:
        """Return the keys that should be there and are not, while the lease itself is."""
        try:
            there = self._keys()
            if there is None:
                return []
            for key in there.difference(self._values):
                self._values[key] = self._value(key)
        except OSError as error:
            log.debug("Registration not looked at", error=error)
            return []
        return [key for key in self._values if key not in there]

    def restore(self, names: Collection[str]) -> None:
        """Put keys back as they were, the instance (``v1/instances``) before the models (``v1/mdc``)."""
        for key in sorted(names, key=base64.b64decode):
            if not self._closed:
                self._call("/v3/kv/put", {"key": key, "value": self._values[key], "lease": self._lease})

    def close(self) -> None:
        """Restore nothing any more, not even when a call that hangs goes on."""
        self._closed = True

    def _keys(self) -> set[str] | None:
        """Return the keys of the lease; None if it has ended."""
        answer = self._call("/v3/lease/timetolive", {"ID": self._lease, "keys": True})
        return set(answer.get("keys", ())) if int(answer.get("TTL", -1)) > 0 else None

    def _value(self, key: str) -> str:
        found = self._call("/v3/kv/range", {"key": key}).get("kvs", ())
        if not found:  # removed meanwhile; nothing must be put back that was never read
            raise OSError(f"etcd: the key {base64.b64decode(key).decode(errors='replace')} cannot be read")
        return str(found[0].get("value", ""))

    def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the endpoint that answered last, then the others, once each; a token that has ended is renewed."""
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
    """What one worker has in discovery.

    :ivar problem: why it is out of discovery without having left it; None while it is in.
    """

    def __init__(self, store: Store, on_fatal: Callable[[WorkerError], None], *, timeout: float) -> None:
        """Watch ``store`` as soon as :meth:`run` runs.

        :param on_fatal: called when the worker has been out of discovery for ``timeout`` seconds.
        """
        self.problem: str | None = None
        self._store = store
        self._on_fatal = on_fatal
        self._timeout = timeout
        self._out_for = 0.0
        #: What was lost before the entries are taken for what should be there; None once they are.
        self._unadopted: list[str] | None = []
        self._lock = asyncio.Lock()
        self._closed = False
        # A thread of its own: discovery may hang, in a dead network file system for example.
        self._executor = ThreadPoolExecutor(1, "registration")
        self._call: asyncio.Future[Any] | None = None

    async def run(self) -> None:
        """Watch until closed or cancelled, or until coming back was given up."""
        looked = time.monotonic()
        while not self._closed:
            out = self.problem is not None
            async with self._lock:
                try:
                    await self._adopt()
                    await self._look()
                except OSError as error:
                    if self._unadopted is None:  # otherwise nothing is known to be lost
                        self._out(_reason(error))
            # Time in which this process itself did not run does not count.
            passed, looked = min(time.monotonic() - looked, _PATIENCE + _CONFIRM), time.monotonic()
            if out:  # so it has tried to come back
                self._out_for += passed
            if self.problem is None:
                if out:
                    log.warning("In discovery again", out_s=self._out_for)
                self._out_for = 0.0
            elif self._out_for >= self._timeout and not self._closed:
                self._on_fatal(
                    DiscoveryLostError(
                        f"the worker fell out of discovery and cannot come back; tried for {self._timeout:g} s: "
                        f"{self.problem}"
                    )
                )
                return
            await asyncio.sleep(self._store.interval if self.problem is None else _CONFIRM)

    async def entered(self, count: int) -> bool:
        """Wait until ``count`` entries are there and known, for some seconds; return whether they are.

        The runtime does not say when: it registers endpoints on its own, after the call that serves them has begun.
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
    async def changing(self) -> AsyncIterator[None]:
        """While this block runs, the worker takes entries out of discovery, or puts them there, itself."""
        async with self._lock:
            lost: list[str] = []
            with contextlib.suppress(OSError):
                lost = await self._ask(self._store.missing)
            try:
                yield
            finally:
                self._unadopted = lost
                with contextlib.suppress(OSError):  # tried again before the next look
                    await self._adopt()

    async def close(self) -> None:
        """Stop watching: the worker is about to leave discovery for good."""
        self._closed = True
        self._store.close()
        if self._call is not None:
            await asyncio.wait({self._call}, timeout=_CLOSE)
        self._executor.shutdown(wait=False)

    async def _adopt(self) -> None:
        """Take what is there, and what was lost unasked, for what should be there."""
        lost = self._unadopted
        if lost is not None:
            await self._ask(lambda: self._store.adopt(lost))
            self._unadopted = None

    async def _look(self) -> None:
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
        """Call a method of the store in its thread.

        :raises OSError: it failed, or discovery does not answer.
        """
        if self._closed:
            raise ConnectionAbortedError("the worker leaves discovery")
        if self._call is not None and not self._call.done():
            await self._wait(self._call)  # an earlier call that hung
        try:
            future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        except RuntimeError as error:  # no thread can be started
            raise OSError(str(error)) from error
        future.add_done_callback(lambda call: call.cancelled() or call.exception())  # nobody may be left to ask
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
