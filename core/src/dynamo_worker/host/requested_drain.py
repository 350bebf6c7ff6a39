"""Draining a worker on request, without ending it: out of discovery, nothing in flight, the engine warm; and back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import WorkerError, describe
from dynamo_worker.host import draining
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.shutdown_plan import UNREGISTER_LIMIT
from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.lifecycle import State
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.engine import Engine
    from dynamo_worker.host.discovery.runtime import Runtime
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.host.requests.serving import RequestRegistry

log = get_logger(__name__)

#: Why requests are refused and ended, for clients.
_REASON: Final = "the worker is drained on request"
#: What Ctrl-C does meanwhile, on the worker's own terminal.
_HINT: Final = "Ctrl-C to stop the worker."
#: Seconds between attempts to leave a discovery that fails.
_RETRY: Final = 2.0
#: Seconds for discovery to take the worker back.
_ENTER: Final = 10.0
#: Seconds for a cancelled step to end, and for one that a shutdown cancels.
_CANCEL: Final = 1.0
_GIVE_WAY: Final = 0.1

#: The modes from the most patient one to the least.
_STRICTNESS: Final = (DrainMode.COMPLETE, DrainMode.HANDOFF, DrainMode.ABORT)


@dataclass(frozen=True)
class DrainRequest:
    """What an operator asks for.

    :param mode: what happens to requests in flight.
    :param deadline: when those that are left are ended.
    :param grace: seconds to accept requests after leaving discovery, for routers that have not noticed yet.
    """

    mode: DrainMode
    deadline: Deadline
    grace: float

    def hurried(self, other: DrainRequest) -> DrainRequest:
        """Return this request, made faster by another one where that is faster."""
        return DrainRequest(
            max(self.mode, other.mode, key=_STRICTNESS.index),
            Deadline(min(self.deadline.at, other.deadline.at)),
            min(self.grace, other.grace),
        )


class RequestedDrain:
    """Takes a serving worker out of service and back. A shutdown, once it begins, takes over.

    :ivar phase: where the worker is between the two.
    :ivar left_at: when it left discovery (monotonic); None while it has not.
    """

    def __init__(
        self,
        engine: Engine,
        runtime: Runtime,
        requests: RequestRegistry,
        plugins: Plugins,
        *,
        state: Callable[[], State],
        on_phase: Callable[[DrainPhase], None],
    ) -> None:
        """Prepare to drain a worker.

        :param state: returns the worker's state; only one that serves can be drained.
        :param on_phase: called with each new phase.
        """
        self.phase = DrainPhase.SERVING
        self.left_at: float | None = None
        self._engine = engine
        self._runtime = runtime
        self._requests = requests
        self._plugins = plugins
        self._state = state
        self._on_phase = on_phase
        self._request: DrainRequest | None = None
        #: One change at a time.
        self._lock = asyncio.Lock()
        self._leaving: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._entering: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def problem(self) -> str | None:
        """Why the worker is not ready; None if it serves."""
        if self.phase is DrainPhase.SERVING:
            return None
        if self.phase in (DrainPhase.DRAINED, DrainPhase.RESUMING):
            return f"{self.phase} on request"
        return f"draining on request: {len(self._requests)} in flight"

    def report(self) -> dict[str, Any]:
        """Return the progress as a JSON object."""
        discovery = self._runtime.discovery
        report: dict[str, Any] = {
            "phase": self.phase.value,
            "in_flight": len(self._requests),
            "in_discovery": discovery.present,
            "engine_paused": discovery.engine_out,
        }
        if self._request is not None:
            report |= {"mode": self._request.mode.value, "left_s": round(self._request.deadline.remaining(), 3)}
        return report

    async def drain(self, request: DrainRequest) -> None:
        """Begin to drain, and return; a drain in progress is made faster, never slower.

        :raises WorkerError: the worker does not serve.
        """
        async with self._lock:
            self.require_service()
            if self._request is None:
                self._request = request
                self._runtime.set_ready(False)
                log.info(
                    "Draining on request",
                    mode=request.mode,
                    in_flight=len(self._requests),
                    grace_s=request.grace,
                    budget_s=request.deadline.remaining(),
                )
                self._begin()
                return
            hurried = self._request.hurried(request)
            if self.phase is DrainPhase.DRAINED or hurried == self._request:
                return
            await self._cancel(self._draining)
            self.require_service()
            self._request = hurried
            log.info("Draining faster on request", mode=hurried.mode, budget_s=hurried.deadline.remaining())
            self._draining = asyncio.ensure_future(self._drain(hurried))

    async def resume(self) -> None:
        """Return to service, and stop a drain in progress; requests that it has not ended go on.

        :raises WorkerError: the worker does not serve, or discovery does not take it back. Then it stays drained.
        """
        async with self._lock:
            self.require_service()
            if self._request is None:
                return
            await self._cancel(self._draining, self._leaving)
            self.require_service()
            self._enter(DrainPhase.RESUMING)
            self._requests.accept()
            self._entering = asyncio.ensure_future(self._runtime.discovery.enter())
            await asyncio.wait({self._entering}, timeout=_ENTER)
            self.require_service()
            if not self._entering.done():
                await self._stay(f"it has not answered for {_ENTER:g} s")
            try:
                self._entering.result()
            except (Exception, asyncio.CancelledError) as error:
                await self._stay(describe(error))
            self._request = self.left_at = None
            self._runtime.set_ready(True)
            self._enter(DrainPhase.SERVING)
            log.info("Resumed on request", engine_paused=self._runtime.discovery.engine_out)

    async def give_way(self) -> None:
        """Stop whatever is in progress and refuse further requests: the worker shuts down."""
        self._closed = True
        await self._cancel(self._draining, self._leaving, self._entering, timeout=_GIVE_WAY)

    def require_service(self) -> None:
        """Return if the worker serves, drained or not.

        :raises WorkerError: it is starting or shutting down.
        """
        state = self._state()
        if self._closed or state is not State.SERVING:
            doing = "starting" if state is State.STARTING else "shutting down"
            raise WorkerError(f"the worker is {doing}")

    def _begin(self) -> None:
        """Start the tasks of a drain from its first phase, or from the one after leaving discovery."""
        assert self._request is not None
        self._enter(DrainPhase.LEAVING if self.left_at is None else DrainPhase.DRAINING)
        self._leaving = asyncio.ensure_future(self._leave())
        self._draining = asyncio.ensure_future(self._drain(self._request))

    async def _stay(self, why: str) -> None:
        """Continue the drain after discovery has not taken the worker back.

        :raises WorkerError: always.
        """
        await self._cancel(self._entering)
        self.require_service()
        self._begin()
        log.warning("Cannot enter discovery; the worker stays drained", error=why)
        raise WorkerError(f"the worker stays drained: discovery does not take it back: {why}", hint="try again")

    async def _leave(self) -> None:
        """Leave discovery; try again until it works."""
        while not await self._left():
            await asyncio.sleep(_RETRY)

    async def _left(self) -> bool:
        try:
            await self._runtime.discovery.leave()
        except Exception as error:
            log.warning("Cannot leave discovery; trying again", error=error)
            return False
        return True

    async def _drain(self, request: DrainRequest) -> None:
        """Go through the phases; begun again, it skips what has been done."""
        if self.left_at is None:
            assert self._leaving is not None
            await asyncio.wait({self._leaving}, timeout=UNREGISTER_LIMIT)
            self.left_at = time.monotonic()
        grace = Deadline(min(self.left_at + request.grace, request.deadline.at)).remaining()
        if grace > 0:
            self._enter(DrainPhase.GRACE)
            await asyncio.sleep(grace)
        self._enter(DrainPhase.DRAINING)
        order = draining.Order(request.mode, request.deadline, _REASON, _HINT)
        await draining.drain(self._requests, self._plugins, self._engine, order)
        await draining.end_requests(self._requests, request.mode.cut, _REASON)
        await self._requests.wait_idle()
        self._enter(DrainPhase.DRAINED)
        log.info("Drained on request", next="`dynamo-worker resume` returns the worker to service, SIGTERM stops it")

    def _enter(self, phase: DrainPhase) -> None:
        if phase is not self.phase:
            self.phase = phase
            self._on_phase(phase)

    @staticmethod
    async def _cancel(*tasks: asyncio.Task[None] | None, timeout: float = _CANCEL) -> None:
        running = {task for task in tasks if task is not None and not task.done()}
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=timeout)
