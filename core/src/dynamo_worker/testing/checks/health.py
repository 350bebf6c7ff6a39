"""Checks of ``check_health`` and ``processes``: a well engine says so, and names what it consists of."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from dynamo_worker.testing.resource_snapshot import descendants

if TYPE_CHECKING:
    from dynamo_worker.host.plugins.calling import HookOutcome
    from dynamo_worker.testing.trial import Answer, Trial


async def _health(trial: Trial) -> list[HookOutcome]:
    return await trial.plugins.check_health(trial.engine, timeout=10)


class HealthChecks:
    """``check_health`` and ``processes`` of an engine that runs."""

    def test_a_health_check_answers_in_time(self, trial: Trial) -> None:
        """A check that is late counts as a dead engine and ends the worker."""
        started = time.monotonic()
        outcomes = trial.run(_health(trial), where=getattr(trial.engine, "check_health", None))
        seconds, limit = time.monotonic() - started, trial.subject.patience
        for outcome in outcomes:
            trial.expect(outcome.ok, f"check_health: {outcome.error!r}", getattr(trial.engine, "check_health", None))
        trial.expect(seconds < limit, f"it took {seconds:.2f} s; at most {limit}")

    def test_health_checks_disturb_no_request(self, trial: Trial) -> None:
        """They run all the time, in the middle of every answer."""

        async def check() -> Answer:
            answer = asyncio.ensure_future(trial.ask(trial.request(12, prompt=1)))
            for _ in range(5):
                await _health(trial)
            return await answer

        tokens = trial.run(check()).content()
        trial.expect(tokens == trial.plain().content(), f"{tokens} instead of {trial.plain().content()}")

    def test_health_checks_beside_each_other(self, trial: Trial) -> None:
        """A late check may overlap with the next one."""

        async def check() -> list[list[HookOutcome]]:
            return await asyncio.gather(*(_health(trial) for _ in range(4)))

        for outcomes in trial.run(check()):
            for outcome in outcomes:
                trial.expect(outcome.ok, f"check_health: {outcome.error!r}")

    def test_processes_of_the_engine_are_named(self, trial: Trial) -> None:
        """The worker watches what ``processes`` names: the death of any other process goes unnoticed."""
        mine = {pid: command for pid, command in descendants().items() if "resource_tracker" not in command}
        named = list(trial.engine.processes())
        trial.expect(
            named or not mine,
            f"processes() is empty; below this process run {list(mine.values())[:3]}",
            trial.engine.processes,
        )

    def test_processes_of_the_engine_are_alive(self, trial: Trial) -> None:
        """The worker takes a pid that does not exist for a dead engine, and ends."""
        for pid in trial.engine.processes():
            trial.expect(os.path.exists(f"/proc/{pid}"), f"process {pid} does not exist", trial.engine.processes)
