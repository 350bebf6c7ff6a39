"""Starts the monitors of a serving worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.engine import HasCanary
from dynamo_worker.host.monitors.engine_activity import EngineActivity
from dynamo_worker.host.monitors.engine_monitors import HealthMonitor, Heartbeat, StallMonitor
from dynamo_worker.host.monitors.threads import ThreadMonitor
from dynamo_worker.host.requests.canary import Canary

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.errors import WorkerError
    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.parts import ReadyWorker, WorkerParts
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.host.supervisor_channel import SupervisorChannel


def start_monitors(
    parts: WorkerParts,
    worker: ReadyWorker,
    settings: WorkerSettings,
    plugins: Plugins,
    control: SupervisorChannel,
    *,
    on_fatal: Callable[[WorkerError], None],
    on_no_threads: Callable[[WorkerError], None],
) -> None:
    """Start everything that watches a serving worker, and tell the plugins that it is ready.

    :param on_fatal: called by a monitor that finds a fatal error.
    :param on_no_threads: called when no more threads can be started.
    """
    engine, requests, metrics, monitors = worker.engine, parts.requests, parts.metrics, parts.monitors
    interval, timeout = settings.health_check_interval, settings.health_check_timeout
    monitors.start(Heartbeat(control, requests, metrics, timeout=settings.heartbeat_timeout).run())
    activity = EngineActivity(tuple(engine.processes()))
    busy_timeout = settings.stall_timeout_busy
    health = HealthMonitor(
        plugins, engine, requests, activity, metrics, on_fatal,
        interval=interval, timeout=timeout, busy_timeout=busy_timeout, tell=control.send,
    )  # fmt: skip
    monitors.start(health.run())
    monitors.start(ThreadMonitor(on_no_threads, interval=interval).run())
    if settings.stall_timeout and isinstance(engine, HasCanary):
        canary = Canary(engine, engine.canary_request, requests)
        stalls = StallMonitor(
            engine, requests, canary.send, activity, on_fatal,
            timeout=settings.stall_timeout, busy_timeout=busy_timeout,
        )  # fmt: skip
        monitors.start(stalls.run())
    if worker.registration is not None:
        monitors.start(worker.registration.run())
        monitors.start(worker.registration.compare_cards())
    monitors.start(_call_on_ready(plugins, worker, timeout))
    if parts.frontend is not None:
        parts.frontend.start_monitor(interval=interval, timeout=timeout)


async def _call_on_ready(plugins: Plugins, worker: ReadyWorker, timeout: float) -> None:
    await plugins.on_ready(worker.engine, worker.info, timeout)
