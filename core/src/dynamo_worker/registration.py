"""Watches what this worker has in discovery, and puts it back when it vanishes without the worker's doing.

The runtime refreshes its entries by itself, but never makes one again (measured on 1.6.1): a worker that was stopped
for 14 s, or had no descriptor left to refresh a file with, would be healthy and without requests for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from dynamo_worker.errors import DiscoveryLostError
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from dynamo_worker.errors import WorkerError

log = get_logger(__name__)

_T = TypeVar("_T")

#: Seconds between two looks.
_INTERVAL = 1.0
#: Seconds before a lost entry is put back. The supervisor withdraws a worker whose loop hangs, and kills it 1 s later:
#: one that comes to itself in between must not register again.
_CONFIRM = 1.5
#: Seconds that discovery may take to answer. Entries expire after ten without a refresh, with every backend.
_PATIENCE = 10.0
#: The runtime refreshes files every 3.3 s (measured on 1.6.1). One that is older than this is refreshed here.
_OVERDUE = 5.0
#: Seconds that leaving discovery waits for a look that is under way.
_CLOSE = 0.3


class Store(Protocol):
    """Where the entries are. Every method may block and raise OSError; never two at a time."""

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

    def __init__(self, root: str, instance: str) -> None:
        self._root = root
        self._instance = instance
        self._files: dict[str, _File] = {}
        self._directories = [root]
        self._modified: dict[str, int] = {}
        self._settled = False
        self._closed = False

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
            with open(draft, "wb") as file:
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
                    if known is not None and known.inode == os.stat(path).st_ino:
                        continue
                    with open(path, "rb") as file:
                        self._files[path] = _File(os.fstat(file.fileno()).st_ino, file.read())
                except FileNotFoundError:  # removed meanwhile
                    continue
        self._directories = directories


def _raise(error: OSError) -> None:
    raise error


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
        self._lock = asyncio.Lock()
        self._closed = False
        # A thread of its own: discovery may hang, in a dead network file system for example.
        self._executor = ThreadPoolExecutor(1, "registration")
        self._call: asyncio.Future[Any] | None = None

    async def run(self) -> None:
        """Watch until closed or cancelled, or until coming back was given up."""
        global _watched
        _watched = self
        adopted = False
        while not self._closed:
            async with self._lock:
                started = time.monotonic()
                try:
                    if not adopted:
                        await self._ask(lambda: self._store.adopt(()))
                        adopted = True
                    await self._look()
                except OSError as error:
                    if adopted:  # otherwise nothing is known to be lost
                        self._out(_reason(error))
            wait = _INTERVAL if self.problem is None else _CONFIRM
            await asyncio.sleep(wait)
            if self.problem is None:
                self._out_for = 0.0
                continue
            # Time in which this process itself did not run does not count.
            self._out_for += min(time.monotonic() - started, _PATIENCE + _CONFIRM)
            if self._out_for >= self._timeout and not self._closed:
                self._on_fatal(
                    DiscoveryLostError(
                        f"the worker fell out of discovery and cannot come back; tried for {self._timeout:g} s: "
                        f"{self.problem}"
                    )
                )
                return

    @contextlib.asynccontextmanager
    async def leaving(self) -> AsyncIterator[None]:
        """While this block runs, the worker takes entries out of discovery itself."""
        async with self._lock:
            lost: list[str] = []
            with contextlib.suppress(OSError):
                lost = await self._ask(self._store.missing)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    await self._ask(lambda: self._store.adopt(lost))

    async def close(self) -> None:
        """Stop watching: the worker is about to leave discovery for good."""
        global _watched
        self._closed = True
        self._store.close()
        if _watched is self:
            _watched = None
        if self._call is not None:
            await asyncio.wait({self._call}, timeout=_CLOSE)
        self._executor.shutdown(wait=False)

    async def _look(self) -> None:
        missing = await self._ask(self._store.missing)
        if missing and self.problem is None:
            self._out(f"{len(missing)} of its entries have vanished")
            return
        if missing:
            await self._ask(lambda: self._store.restore(missing))
            missing = await self._ask(self._store.missing)
        if self.problem is not None and not missing:
            self.problem = None
            log.warning("In discovery again", out_s=self._out_for)

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
        future = asyncio.get_running_loop().run_in_executor(self._executor, function)
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


#: That of this process, while it serves.
_watched: Registration | None = None


@contextlib.asynccontextmanager
async def leaving() -> AsyncIterator[None]:
    """While this block runs, what vanishes from discovery does so on purpose and is not put back."""
    if _watched is None:
        yield
        return
    async with _watched.leaving():
        yield
