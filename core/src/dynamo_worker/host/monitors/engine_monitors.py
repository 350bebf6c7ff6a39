"""Monitors of a serving worker: the engine's health, its progress, the frontend, and the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from dynamo_worker.containment import contained
from dynamo_worker.engine import Engine, MayPause, ReportsProgress
from dynamo_worker.errors import EngineDeadError, EngineStalledError, WorkerError, describe
from dynamo_worker.host.plugins.calling import report
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.host.requests.serving import RequestRegistry
    from dynamo_worker.host.status.metrics import WorkerMetrics
    from dynamo_worker.host.supervisor_channel import SupervisorChannel

log = get_logger(__name__)

OnFatal = Callable[[WorkerError], None]

#: Seconds that a timer of the event loop may fire early (uvloop counts whole milliseconds).
_TIMER_SLACK = 0.005


def _paused(engine: Engine) -> bool:
    return isinstance(engine, MayPause) and engine.paused()


class HealthMonitor:
    """Calls every plugin's ``check_health`` at an interval.

    An EngineDeadError is fatal, and so is a check that does not return in time, unless the engine is paused. Other
    errors are logged and counted: a broken check must not end a healthy engine.
    """

    def __init__(
        self,
        plugins: Plugins,
        engine: Engine,
        metrics: WorkerMetrics,
        on_fatal: OnFatal,
        *,
        interval: float,
        timeout: float,
    ) -> None:
        self._plugins = plugins
        self._engine = engine
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._interval = interval
        self._timeout = timeout

    async def run(self) -> None:
        """Check until cancelled or until a check is fatal."""
        while True:
            await asyncio.sleep(self._interval)
            started = time.monotonic()
            paused = _paused(self._engine)
            try:
                outcomes = await self._plugins.check_health(self._engine, timeout=self._timeout)
            except EngineDeadError as error:
                self._on_fatal(error)
                return
            finally:
                self._metrics.health_check_seconds.observe(time.monotonic() - started)
            paused = paused or _paused(self._engine)
            for outcome in outcomes:
                if outcome.error is None:
                    continue
                if isinstance(outcome.error, TimeoutError) and outcome.duration >= self._timeout - _TIMER_SLACK:
                    if paused:
                        continue
                    self._on_fatal(
                        EngineStalledError(
                            f"the health check of {outcome.plugin} did not answer within {self._timeout:g} s"
                        )
                    )
                    return
                report(outcome)
                self._metrics.health_check_failures.inc()


class StallMonitor:
    """Notices an engine that is alive but makes no progress.

    A chunk of any request is progress, and so is a step that the engine reports. Without progress, busy or idle, the
    monitor sends one canary request. The engine is stalled only if that produces no chunk either and nothing else has
    moved meanwhile. A paused engine need not make progress.
    """

    #: Share of the timeout after which a quiet engine gets a canary, and share for its answer. The rest allows for the
    #: granularity of the clock: the whole detection ends within the timeout.
    QUIET_SHARE = 0.6
    CANARY_SHARE = 0.3
    TICK_SHARE = 0.02

    def __init__(
        self,
        engine: Engine,
        registry: RequestRegistry,
        canary: Callable[[], Awaitable[None]],
        on_fatal: OnFatal,
        *,
        timeout: float,
    ) -> None:
        """Watch ``engine``.

        :param canary: sends one small request and returns when it is answered.
        :param timeout: most seconds from the last progress to the report.
        """
        self._engine = engine
        self._registry = registry
        self._canary = canary
        self._on_fatal = on_fatal
        self._timeout = timeout

    def _progress(self) -> tuple[int, int]:
        steps = self._engine.progress() if isinstance(self._engine, ReportsProgress) else 0
        return self._registry.chunks, steps

    async def run(self) -> None:
        """Watch until cancelled or until the engine has stalled."""
        tick = self._timeout * self.TICK_SHARE
        quiet_after = self._timeout * self.QUIET_SHARE
        seen = self._progress()
        since = now = time.monotonic()
        while True:
            await asyncio.sleep(tick)
            # While this process itself was held up (stopped, or its loop blocked), nothing could arrive. That is not
            # the engine's fault, so the time does not count.
            late = time.monotonic() - now - tick
            now = time.monotonic()
            if late > tick:
                since += late
            current = self._progress()
            if current != seen or _paused(self._engine):
                seen, since = current, now
            elif now - since >= quiet_after:
                if not await self._answers(seen):
                    return
                seen, since = self._progress(), time.monotonic()
                now = since

    async def _answers(self, seen: tuple[int, int]) -> bool:
        canary = asyncio.ensure_future(contained(self._canary))
        tick = self._timeout * self.TICK_SHARE
        left = self._timeout * self.CANARY_SHARE
        try:
            while left > 0:
                started = time.monotonic()
                await asyncio.wait({canary}, timeout=tick)
                # Time in which this process was held up does not count here either.
                left -= min(time.monotonic() - started, 2 * tick)
                if self._progress() != seen or _paused(self._engine):
                    return True
                if canary.done():
                    return self._judge(canary)
        finally:
            canary.cancel()
        self._on_fatal(
            EngineStalledError(
                f"the engine has made no progress for {self._timeout * self.QUIET_SHARE:g} s "
                f"({len(self._registry)} requests in flight) and a canary request got no answer within "
                f"{self._timeout * self.CANARY_SHARE:g} s"
            )
        )
        return False

    def _judge(self, canary: asyncio.Future[None]) -> bool:
        error = asyncio.CancelledError() if canary.cancelled() else canary.exception()
        if isinstance(error, EngineDeadError):
            self._on_fatal(error)
            return False
        if error is not None:
            # An error is an answer, too: the engine is alive.
            log.warning("Canary request failed", error=describe(error))
        return True


class FrontendMonitor:
    """Notices a frontend that is alive but does not answer."""

    TICK_SHARE = 0.02

    def __init__(
        self,
        check: Callable[[], Coroutine[Any, Any, None]],
        on_fatal: OnFatal,
        *,
        interval: float,
        timeout: float,
    ) -> None:
        """Watch a frontend.

        :param check: returns as soon as the frontend gives any answer.
        :param timeout: seconds without an answer after which it counts as hung.
        """
        self._check = check
        self._on_fatal = on_fatal
        self._interval = interval
        self._timeout = timeout

    async def run(self) -> None:
        """Check until cancelled or until the frontend hangs."""
        tick = self._timeout * self.TICK_SHARE
        while True:
            await asyncio.sleep(self._interval)
            left = self._timeout
            check = asyncio.ensure_future(self._check())
            try:
                while left > 0 and not check.done():
                    started = time.monotonic()
                    await asyncio.wait({check}, timeout=tick)
                    # Time in which this process was held up does not count.
                    left -= min(time.monotonic() - started, 2 * tick)
                if not check.done():
                    self._on_fatal(WorkerError(f"the frontend has not answered for {self._timeout:g} s"))
                    return
                error = check.exception()
                if error is not None:  # it refuses connections; if it is dead, the watch of its process reports that
                    log.warning("Frontend check failed", error=error)
            finally:
                check.cancel()


class Heartbeat:
    """Tells the supervisor that the event loop runs, and measures its lag."""

    def __init__(
        self, control: SupervisorChannel, registry: RequestRegistry, metrics: WorkerMetrics, *, timeout: float
    ) -> None:
        """Beat five times within ``timeout`` seconds, and at least every 5 s."""
        self._control = control
        self._registry = registry
        self._metrics = metrics
        self._interval = min(timeout / 5, 5.0) if timeout else 5.0

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            due = time.monotonic() + self._interval
            self._control.send("heartbeat", in_flight=len(self._registry))
            await asyncio.sleep(self._interval)
            self._metrics.event_loop_lag.set(max(0.0, time.monotonic() - due))
