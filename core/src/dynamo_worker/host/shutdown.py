"""Shutting a worker down: leave discovery, end the requests in flight, release every part."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.containment import contained
from dynamo_worker.deadline import Deadline
from dynamo_worker.host import draining, tracing
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.requests.serving import SHUTTING_DOWN
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dynamo_worker.engine import Engine
    from dynamo_worker.host.config.drain_mode import Cut
    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.parts import WorkerParts
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.lifecycle import State

log = get_logger(__name__)

#: Seconds for the runtime to close its connections once nothing is in flight.
RUNTIME_SECONDS: Final = 3.0


class Shutdown:
    """The steps of a shutdown; a step for a part that does not exist does nothing.

    A step that fails is logged and does not keep the next one from being taken.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        plugins: Plugins,
        parts: WorkerParts,
        state: Callable[[], State],
        *,
        supervised: bool,
    ) -> None:
        """Prepare to shut down ``parts``.

        :param state: returns the worker's state: an error in a step is a cancellation if the worker has left the state.
        :param supervised: whether a supervisor cleans up after this process.
        """
        self._settings = settings
        self._plugins = plugins
        self._parts = parts
        self._state = state
        self._supervised = supervised
        self._unregistered = False

    def use(self, settings: WorkerSettings) -> None:
        """Shut down with these settings: those of the start, adapted to the engine."""
        self._settings = settings

    async def unregister(self, deadline: Deadline) -> None:
        """Leave discovery by the deadline; a supervisor withdraws entries that could not be removed."""
        runtime, requested = self._parts.runtime, self._parts.requested_drain
        if requested is not None:
            await requested.give_way()
        if runtime is None or self._unregistered:
            return
        runtime.set_ready(False)
        try:
            self._unregistered = await asyncio.wait_for(contained(runtime.unregister), deadline.remaining())
        except (asyncio.TimeoutError, TimeoutError):
            without_us = "is withdrawn by the supervisor at the end" if self._supervised else "expires after the exit"
            log.warning("Discovery did not answer", next=f"the registration {without_us}")

    def grace_deadline(self, stop_at: float) -> Deadline:
        """Return when the grace period ends: after a drain on request, earlier or at once.

        :param stop_at: when the stop was requested (monotonic).
        """
        now, requested = time.monotonic(), self._parts.requested_drain
        if self._parts.requests.refusing:
            return Deadline(now)
        left_at = None if requested is None else requested.left_at
        return self._settings.shutdown_plan.grace_deadline(now if left_at is None else left_at, stop_at)

    async def try_to_unregister(self, deadline: Deadline) -> None:
        """Leave discovery as :meth:`unregister` does, and log a failure."""
        await self._attempt("leave discovery", self.unregister(deadline))

    async def drain(self, engine: Engine, deadline: Deadline) -> None:
        """Refuse new requests; let those in flight finish until the deadline, or end them, depending on the mode."""
        self._drain_frontend()
        how = draining.Order(self._settings.drain, deadline, SHUTTING_DOWN)
        await draining.drain(self._parts.requests, self._plugins, engine, how)

    async def end_requests(self, how: Cut, reason: str) -> None:
        """Refuse new requests, end those in flight, and wait a moment for their last messages to be sent."""
        self._parts.requests.refuse(reason)
        await draining.end_requests(self._parts.requests, how)

    async def release(self, deadline: Deadline) -> str | None:
        """Release all parts, in order: connections, engine, frontend, files.

        :returns: how the frontend failed while it drained, or None.
        """
        parts = self._parts
        parts.processes.close()
        if parts.status is not None:
            parts.status.stop_routes()
        await self._shut_down_runtime(deadline)
        idle_since = time.monotonic()
        await self._clean_up_engine(deadline)
        frontend_failure = await self._stop_frontend(deadline)
        await tracing.wait_until_sent(idle_since, deadline.reserve(draining.HOOK_MARGIN))
        if parts.status is not None:
            parts.status.close()
        self._remove_own_directory(deadline)
        return frontend_failure

    async def _shut_down_runtime(self, deadline: Deadline) -> None:
        if self._parts.runtime is not None:
            shutdown = self._parts.runtime.shutdown(deadline.within(RUNTIME_SECONDS).remaining())
            if await self._attempt("shut down the runtime", shutdown):
                log.info("DistributedRuntime shutdown complete")

    async def _clean_up_engine(self, deadline: Deadline) -> None:
        if self._parts.engine is not None:
            limit = self._settings.engine_shutdown_timeout
            hooks = self._plugins.cleanup(self._parts.engine, deadline.reserve(draining.HOOK_MARGIN), limit=limit)
            await self._attempt("clean up", hooks)

    def _drain_frontend(self) -> None:
        if self._parts.frontend is not None:
            self._parts.frontend.drain()

    async def _stop_frontend(self, deadline: Deadline) -> str | None:
        frontend = self._parts.frontend
        if frontend is None:
            return None
        frontend.drain()
        failure = frontend.failure
        if not self._supervised:  # otherwise the supervisor waits for it
            stop = frontend.stop(deadline, abort=self._settings.drain is DrainMode.ABORT)
            await self._attempt("stop the frontend", stop)
        return failure

    def _remove_own_directory(self, deadline: Deadline) -> None:
        directory = self._parts.own_directory
        if directory is None:
            return
        problems = directory.remove(time.monotonic() + deadline.remaining())
        directory.close()
        if problems:
            log.warning("Run directory not removed", path=directory.path, reason="; ".join(problems[:3]))

    async def _attempt(self, what: str, step: Awaitable[Any]) -> bool:
        """Take one step, log its failure, and return whether it succeeded."""
        state = self._state()
        try:
            await step
        except BaseException as error:
            if self._state() is not state:  # cancelled: the worker has moved on
                raise
            log.error("Shutdown step failed", step=what, state=state, exc_info=error)
            return False
        return True
