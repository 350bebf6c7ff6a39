"""What watches a serving worker: the engine's processes, its health, its progress, and the event loop itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from dynamo_worker.containment import contained
from dynamo_worker.engine import Engine, MayPause, ReportsProgress
from dynamo_worker.errors import EngineDeadError, EngineStalledError, WorkerError, describe
from dynamo_worker.host.calling import report
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from dynamo_worker.host.metrics import WorkerMetrics
    from dynamo_worker.host.plugins import Plugins
    from dynamo_worker.host.serving import RequestRegistry
    from dynamo_worker.host.supervisor_channel import SupervisorChannel

log = get_logger(__name__)

OnFatal = Callable[[WorkerError], None]

#: How much too early a timer of the event loop may fire, in seconds (uvloop's count whole milliseconds).
_TIMER_SLACK = 0.005


def _paused(engine: Engine) -> bool:
    return isinstance(engine, MayPause) and engine.paused()


class HealthMonitor:
    """Calls every plugin's ``check_health`` at an interval.

    Fatal are an EngineDeadError and a check that does not return in time, unless the engine is paused. Any other error
    is logged and counted: a check that is broken itself must not end a healthy engine.
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
        """Check until cancelled or until a check was fatal."""
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
    """Notices an engine that is alive but does nothing.

    Any progress at all vouches for the engine: a chunk of any request, a step that the engine itself reports. Without
    any, busy or idle, one canary request is sent; only if that does not produce a chunk either, and nothing else has
    moved meanwhile, the engine is held to be stalled. One that is paused is not expected to do anything.
    """

    #: Share of the stall timeout after which a quiet engine is asked, and share that the canary gets to answer. The
    #: rest is for the granularity of the clock, so that the whole detection ends within the timeout.
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

        :param canary: sends one small request and returns at its first chunk.
        :param timeout: seconds from the last progress to the report, at most.
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
            # When this process itself was held up (stopped, a blocked loop), nothing could arrive: not the engine's
            # fault, so that time does not count.
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
                # Here too, time in which this process itself was held up does not count.
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
            # It answered, if only with an error: alive.
            log.warning("Canary request failed", error=describe(error))
        return True


class FrontendMonitor:
    """Notices a frontend beside the worker that is alive but does not answer."""

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

        :param check: returns as soon as the frontend answers anything.
        :param timeout: seconds without an answer after which it is held to hang.
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
                    # Time in which this process itself was held up does not count.
                    left -= min(time.monotonic() - started, 2 * tick)
                if not check.done():
                    self._on_fatal(WorkerError(f"the frontend has not answered for {self._timeout:g} s"))
                    return
                error = check.exception()
                if error is not None:  # it refuses connections: if it is dead, the watch over its process says so
                    log.warning("Frontend check failed", error=error)
            finally:
                check.cancel()


class Heartbeat:
    """Tells the supervisor that the event loop runs, and measures how late it runs."""

    def __init__(
        self, control: SupervisorChannel, registry: RequestRegistry, metrics: WorkerMetrics, *, timeout: float
    ) -> None:
        """Beat five times within ``timeout`` seconds, at least every 5 s."""
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
