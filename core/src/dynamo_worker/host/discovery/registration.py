"""Keeps this worker's entries in discovery: restores those that vanish without the worker having removed them.

The runtime refreshes its entries, but never creates one again (measured on 1.6.1): a worker that was stopped for 14 s,
or had no descriptor left to refresh a file, would stay healthy and get no requests forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_worker.errors import DiscoveryLostError, ServerUnreachableError
from dynamo_worker.host.discovery.card_check import differences
from dynamo_worker.host.discovery.store import DiscoveryAwayError
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from dynamo_worker.errors import WorkerError
    from dynamo_worker.host.discovery.store import Store

log = get_logger(__name__)

_T = TypeVar("_T")

#: Seconds before a lost entry is restored. The supervisor withdraws a worker whose loop hangs and kills it 1 s later:
#: one that recovers in between must not register again.
_CONFIRM = 1.5
#: Seconds for discovery to answer.
_PATIENCE = 10.0
#: Seconds that leaving discovery waits for a check in progress.
_CLOSE = 0.3
#: Seconds for the worker's entries to appear, and between checks of that, at first and at most.
_ENTER = 5.0
_ENTER_INTERVAL = 0.02
_LONGEST_ENTER_INTERVAL = 0.5
#: Seconds for the last entries to be removed at the end.
_RELEASE = 0.5


class Registration:
    """Keeps the entries of one worker in discovery.

    :ivar problem: why the worker is out of discovery although it did not leave; None if it is not.
    :ivar withdrawn: the endpoints ``namespace/component/name`` that the worker keeps out on purpose.
    """

    def __init__(
        self, store: Store, on_fatal: Callable[[WorkerError], None], *, timeout: float, outage: float = float("inf")
    ) -> None:
        """Watch ``store`` once :meth:`run` is called.

        :param on_fatal: called when the worker has been out of discovery for ``timeout`` seconds although it answers,
            or when discovery has not answered for ``outage`` seconds.
        """
        self.problem: str | None = None
        self.withdrawn: Collection[str] = ()
        self._store = store
        self._on_fatal = on_fatal
        self._timeout = timeout
        self._outage = outage
        self._out_for = 0.0
        #: Why discovery does not answer; None if it does.
        self._away: str | None = None
        self._away_for = 0.0
        #: Entries lost before the existing ones become the expected ones; None once they are.
        self._unadopted: list[str] | None = []
        self._lock = asyncio.Lock()
        self._closed = False
        # A separate thread: discovery may hang, for example in a dead network file system.
        self._executor = ThreadPoolExecutor(1, "registration")
        self._call: asyncio.Future[Any] | None = None

    async def run(self) -> None:
        """Watch until closed or cancelled, until restoring the entries has failed for too long, or an outage lasts."""
        checked = time.monotonic()
        while not self._closed:
            out, away = self.problem is not None, self._away is not None
            await self._look()
            # Time in which this process did not run does not count.
            passed, checked = min(time.monotonic() - checked, _PATIENCE + _CONFIRM), time.monotonic()
            if away:
                self._away_for += passed
            elif out:  # it has tried to restore its entries
                self._out_for += passed
            if self._away is None:
                if away:
                    log.warning("Discovery answers again", away_s=self._away_for)
                self._away_for = 0.0
            if self.problem is None:
                if out:
                    log.warning("In discovery again", out_s=self._out_for)
                self._out_for = 0.0
            error = None if self._closed else self._given_up()
            if error is not None:
                self._on_fatal(error)
                return
            await asyncio.sleep(self._store.interval if self.problem is None else _CONFIRM)

    async def _look(self) -> None:
        """Check the entries once, and restore those that are missing."""
        async with self._lock:
            try:
                await self._adopt()
                await self._check()
            except DiscoveryAwayError as error:
                if self._away is None and not self._closed:
                    log.warning(
                        "Discovery does not answer; the worker keeps serving",
                        reason=error,
                        outage_s=self._outage if math.isfinite(self._outage) else "any",
                    )
                self._away = str(error)
                return
            except OSError as error:
                if self._unadopted is None:  # otherwise nothing is known to be lost
                    self._out(_reason(error))
            self._away = None

    def _given_up(self) -> WorkerError | None:
        """Return why the worker must end; None if it need not."""
        if self._away is not None and self._away_for >= self._outage:
            return ServerUnreachableError(
                f"discovery has not answered for {self._outage:g} s: {self._away}",
                hint="look at the server; --discovery-outage sets how long a worker waits for it",
            )
        if self.problem is not None and self._out_for >= self._timeout:
            return DiscoveryLostError(
                f"the worker is out of discovery and could not register again within {self._timeout:g} s: "
                f"{self.problem}"
            )
        return None

    async def entered(self, count: int) -> bool:
        """Wait some seconds for ``count`` entries to exist and be known; return whether they are.

        The runtime does not report it: it registers endpoints some time after the call that serves them.
        """
        give_up = time.monotonic() + _ENTER
        interval = _ENTER_INTERVAL
        while True:
            async with self._lock:
                with contextlib.suppress(OSError):
                    self._unadopted = []
                    await self._adopt()
            if self._store.count >= count:
                return True
            if time.monotonic() > give_up:
                return False
            await asyncio.sleep(interval)
            interval = min(2 * interval, _LONGEST_ENTER_INTERVAL)

    async def compare_cards(self) -> None:
        """Warn once if frontends may ignore this worker because its model card differs from another worker's."""
        async with self._lock:
            try:
                found = differences(*await self._ask(self._store.cards))
            except OSError as error:
                log.debug("Model cards not compared", error=error)
                return
        if found is not None:
            model, differing = found
            log.warning(
                "Frontends may ignore this worker: another one serves its model with a different card",
                model=model,
                differs=", ".join(differing),
                next="give each generation of a rollout its own --namespace-worker-suffix, "
                "and stop the old workers with --drain complete",
            )

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

    async def release(self) -> None:
        """Remove what the runtime has left in discovery; called after :meth:`close`."""
        call = asyncio.get_running_loop().run_in_executor(None, self._store.release)
        call.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # the entries end with their lease
        await asyncio.wait({call}, timeout=_RELEASE)

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
            if self._away is None:  # an outage explains it, and every moment out of discovery costs requests
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
