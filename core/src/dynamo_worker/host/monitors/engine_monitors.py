"""Monitors of a serving worker: the engine's health, its progress, the frontend, and the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.containment import contained
from dynamo_worker.engine import Engine, MayPause, ReportsProgress
from dynamo_worker.errors import EngineDeadError, EngineStalledError, WorkerError, describe
from dynamo_worker.host.plugins.calling import report
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from dynamo_worker.host.monitors.engine_activity import EngineActivity, Finding
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.host.requests.serving import RequestRegistry
    from dynamo_worker.host.status.metrics import WorkerMetrics
    from dynamo_worker.host.supervisor_channel import SupervisorChannel

log = get_logger(__name__)

OnFatal = Callable[[WorkerError], None]

#: Seconds that a timer of the event loop may fire early (uvloop counts whole milliseconds).
_TIMER_SLACK = 0.005
#: Seconds of the shortest health check, the last one before the limit of an engine that works.
_SHORTEST_CHECK = 0.01

#: Share of a timeout at whose end the engine's processes are observed.
OBSERVED_SHARE: Final = 0.2


def _limit(timeout: float, busy_timeout: float) -> float:
    """Return for how many seconds an engine that works may give no sign of progress."""
    return max(timeout, busy_timeout) if busy_timeout else math.inf


def _progress(engine: Engine, registry: RequestRegistry) -> tuple[int, int]:
    """Return what grows with every step of the engine and every chunk of a request."""
    return registry.chunks, engine.progress() if isinstance(engine, ReportsProgress) else 0


def _although(finding: Finding) -> str:
    return ", although the engine works" if finding.works else ""


def _paused(engine: Engine) -> bool:
    return isinstance(engine, MayPause) and engine.paused()


def _silent(_message_type: str, **_fields: Any) -> None:
    """Tell nobody."""


class HealthMonitor:
    """Calls every plugin's ``check_health`` at an interval.

    An EngineDeadError is fatal, and so is a check that does not return in time, unless the engine is paused or works on
    something else. Other errors are logged and counted: a broken check must not end a healthy engine.
    """

    def __init__(
        self,
        plugins: Plugins,
        engine: Engine,
        registry: RequestRegistry,
        activity: EngineActivity,
        metrics: WorkerMetrics,
        on_fatal: OnFatal,
        *,
        interval: float,
        timeout: float,
        busy_timeout: float,
        tell: Callable[..., None] = _silent,
    ) -> None:
        """Check ``engine``.

        :param timeout: seconds for one check.
        :param tell: called with the name ``health`` and the numbers of all checks, for the flight record.
        :param busy_timeout: most seconds without the answer to a check while the engine works; 0 for any number.
        """
        self._plugins = plugins
        self._engine = engine
        self._registry = registry
        self._activity = activity
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._interval = interval
        self._timeout = timeout
        self._limit = _limit(timeout, busy_timeout)
        #: When the first of the checks began that the engine had no time for (monotonic); None if it has answered.
        self._late_since: float | None = None
        self._tell = tell
        self._rounds, self._failed, self._longest = 0, 0, 0.0

    async def run(self) -> None:
        """Check until cancelled or until a check is fatal."""
        while True:
            await asyncio.sleep(self._interval)
            error = await self._check()
            if error is not None:
                self._on_fatal(error)
                return

    async def _check(self) -> WorkerError | None:
        """Check once, and return the error that is fatal."""
        started = time.monotonic()
        since = started if self._late_since is None else self._late_since
        timeout = self._timeout
        if self._late_since is not None:
            rest = since + self._limit - started
            # The last check ends at the limit, and is long enough to observe the engine.
            timeout = max(rest, _SHORTEST_CHECK) if rest < 1.5 * timeout else timeout
        paused = _paused(self._engine)
        observation = self._activity.observe(
            timeout * OBSERVED_SHARE,
            lambda: _progress(self._engine, self._registry),
            after=timeout * (1 - OBSERVED_SHARE),
        )
        try:
            outcomes = await self._plugins.check_health(self._engine, timeout=timeout)
        except EngineDeadError as error:
            return error
        finally:
            observation.close()
            seconds = time.monotonic() - started
            self._metrics.health_check_seconds.observe(seconds)
            self._rounds, self._longest = self._rounds + 1, max(self._longest, seconds)
            self._tell("health", rounds=self._rounds, failed=self._failed, longest=round(self._longest, 4))
        paused = paused or _paused(self._engine)
        late = False
        for outcome in outcomes:
            if outcome.error is None:
                continue
            self._failed += 1
            if isinstance(outcome.error, TimeoutError) and outcome.duration >= timeout - _TIMER_SLACK:
                if paused:
                    continue
                fatal = self._judge(outcome.plugin, time.monotonic() - since, observation.finding())
                if fatal is not None:
                    return fatal
                late = True
            else:
                report(outcome)
                self._metrics.health_check_failures.inc()
        self._late_since = since if late else None
        return None

    def _judge(self, plugin: str, late: float, finding: Finding) -> WorkerError | None:
        problem = f"the health check of {plugin} did not answer within {late:.3g} s"
        if late >= self._limit - _TIMER_SLACK or not finding.works:
            return EngineStalledError(f"{problem}{_although(finding)}: {finding.reason}")
        log.warning(
            "No answer to a health check, but the engine works",
            plugin=plugin, seconds=late, sign=finding.reason, limit_s=self._limit,
        )  # fmt: skip
        return None


class StallMonitor:
    """Notices an engine that is alive but makes no progress.

    A chunk of any request is progress, and so is a step that the engine reports. Without progress, busy or idle, the
    monitor sends one canary request. The engine is stalled only if that produces no chunk either and nothing else has
    moved meanwhile, and if its processes do not work either: engines compile kernels while they serve, for a minute and
    more. One that works without progress has stalled at a second, longer timeout. A paused engine need not make
    progress.
    """

    #: Share of the timeout after which a quiet engine gets a canary, and share for its answer. The rest allows for the
    #: granularity of the clock: the whole detection ends within the timeout.
    QUIET_SHARE = 0.6
    CANARY_SHARE = 0.3
    MARGIN_SHARE = 0.1
    TICK_SHARE = 0.02

    def __init__(
        self,
        engine: Engine,
        registry: RequestRegistry,
        canary: Callable[[], Awaitable[None]],
        activity: EngineActivity,
        on_fatal: OnFatal,
        *,
        timeout: float,
        busy_timeout: float,
    ) -> None:
        """Watch ``engine``.

        :param canary: sends one small request and returns when it is answered.
        :param timeout: most seconds from the last progress, or from the last sign of work, to the report.
        :param busy_timeout: most seconds from the last progress to the report while the engine works; 0 for no limit.
        """
        self._engine = engine
        self._registry = registry
        self._canary = canary
        self._activity = activity
        self._on_fatal = on_fatal
        self._timeout = timeout
        self._limit = _limit(timeout, busy_timeout)

    def _progress(self) -> tuple[int, int]:
        return _progress(self._engine, self._registry)

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
        """Send a canary and wait for any progress; report the engine and return False if it has stalled."""
        canary = asyncio.ensure_future(contained(self._canary))
        waited, left = 0.0, self._timeout * self.CANARY_SHARE
        observed = self._timeout * OBSERVED_SHARE
        observation = self._activity.observe(observed, self._progress, after=left - observed)
        works = False
        try:
            while not await self._moves(canary, seen, left):
                waited += left
                quiet = waited + self._timeout * self.QUIET_SHARE
                finding = observation.finding()
                observation.close()
                rest = self._limit - self._timeout * self.MARGIN_SHARE - quiet
                over = rest <= self._timeout * self.TICK_SHARE
                if over or not finding.works:
                    self._on_fatal(self._stalled(waited, finding))
                    return False
                if not works:
                    log.warning(
                        "No progress, but the engine works", seconds=quiet, sign=finding.reason, limit_s=self._limit
                    )
                works, left = True, observed if rest > 2 * observed else rest
                observation = self._activity.observe(left, self._progress)
        finally:
            observation.close()
            canary.cancel()
        if works:
            log.info("The engine makes progress again", seconds=waited + self._timeout * self.QUIET_SHARE)
        return not canary.done() or self._judge(canary)

    async def _moves(self, canary: asyncio.Future[None], seen: tuple[int, int], seconds: float) -> bool:
        """Wait some seconds; return whether the canary was answered or something else has moved, as soon as it has."""
        tick = self._timeout * self.TICK_SHARE
        left = seconds
        while left > 0:
            started = time.monotonic()
            await asyncio.wait({canary}, timeout=tick)
            # Time in which this process was held up does not count here either.
            left -= min(time.monotonic() - started, 2 * tick)
            if canary.done() or self._progress() != seen or _paused(self._engine):
                return True
        return False

    def _stalled(self, waited: float, finding: Finding) -> EngineStalledError:
        return EngineStalledError(
            f"the engine has made no progress for {self._timeout * self.QUIET_SHARE:g} s "
            f"({len(self._registry)} requests in flight) and a canary request got no answer within {waited:.3g} s"
            f"{_although(finding)}: {finding.reason}"
        )

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

    #: Seconds whose largest lag is reported: a scrape must not miss it.
    LAG_SECONDS = 5.0
    #: A longer lag is logged: streams stand still meanwhile.
    BLOCKED_SECONDS = 1.0

    def __init__(
        self, control: SupervisorChannel, registry: RequestRegistry, metrics: WorkerMetrics, *, timeout: float
    ) -> None:
        """Beat five times within ``timeout`` seconds, and at least every 0.5 s; without a timeout every 5 s."""
        self._control = control
        self._registry = registry
        self._metrics = metrics
        self._interval = min(timeout / 5, 0.5) if timeout else self.LAG_SECONDS
        self._lags: deque[float] = deque(maxlen=max(1, round(self.LAG_SECONDS / self._interval)))

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            due = time.monotonic() + self._interval
            registry = self._registry
            lag = round(max(self._lags, default=0.0), 4)
            self._control.send(
                "heartbeat", in_flight=len(registry), counts=registry.counts, chunks=registry.chunks, lag=lag
            )
            await asyncio.sleep(self._interval)
            lag = max(0.0, time.monotonic() - due)
            self._lags.append(lag)
            self._metrics.event_loop_lag.set(max(self._lags))
            self._metrics.event_loop_delay.observe(lag)
            if lag > self.BLOCKED_SECONDS:
                log.warning("The event loop was blocked", seconds=lag, in_flight=len(self._registry))
