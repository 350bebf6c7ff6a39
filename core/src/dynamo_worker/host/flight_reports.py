"""What the worker tells its supervisor for the flight record: its plan, its hooks, and deaths in its tree.

All of it is rare. What changes with each request goes with the heartbeat, as numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.errors import describe
from dynamo_worker.supervisor.verdict import signal_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.plugins.calling import HookOutcome
    from dynamo_worker.host.supervisor_channel import SupervisorChannel


def plan_of(settings: WorkerSettings) -> dict[str, float]:
    """Return the seconds that each stage of a shutdown may take."""
    return {stage.name: round(stage.duration, 3) for stage in settings.shutdown_plan.stages()}


def send_settings(control: SupervisorChannel, settings: WorkerSettings) -> None:
    """Tell the settings that concern the supervisor."""
    control.send(
        "settings",
        engine=settings.engine,
        termination_grace_period=settings.termination_grace_period,
        heartbeat_timeout=settings.heartbeat_timeout,
        termination_message_path=str(settings.termination_message_path),
        log_format=settings.log_format,
        drain=settings.drain.value,
        plan=plan_of(settings),
    )


def send_plan(control: SupervisorChannel, settings: WorkerSettings) -> None:
    """Tell the plan anew, once it is adapted to the engine."""
    control.send("plan", drain=settings.drain.value, plan=plan_of(settings))


def hook_observer(control: SupervisorChannel) -> Callable[[HookOutcome], None]:
    """Return a function that tells the outcome of a hook."""

    def observe(outcome: HookOutcome) -> None:
        error = None if outcome.error is None else describe(outcome.error)
        seconds = round(outcome.duration, 4)
        control.send("hook", hook=outcome.hook, plugin=outcome.plugin, seconds=seconds, error=error)

    return observe


def death_observer(control: SupervisorChannel) -> Callable[[str, int, int | None], None]:
    """Return a function that tells the death of a process; see :class:`ProcessWatch`."""

    def observe(what: str, pid: int, code: int | None) -> None:
        how: dict[str, int | str] = {}
        if code is not None:
            how = {"exit_code": code} if code >= 0 else {"signal": signal_name(-code)}
        control.send("death", what=what, pid=pid, **how)

    return observe
