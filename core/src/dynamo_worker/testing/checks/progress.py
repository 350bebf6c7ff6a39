"""Checks of ``progress``: it counts steps of work, and nothing else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dynamo_worker.engine import ReportsProgress

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Trial

#: Seconds for what is on its way when a request ends.
_SETTLE = 0.3
#: Seconds during which an idle engine is watched.
_SILENCE = 0.5


def _progress(trial: Trial) -> int:
    if not isinstance(trial.engine, ReportsProgress):
        trial.skip("the engine reports no progress()")
    return trial.engine.progress()


def _at(trial: Trial) -> Any:
    return getattr(trial.engine, "progress", None)


class ProgressChecks:
    """``progress`` of an engine that has it."""

    def test_progress_is_a_number_of_steps(self, trial: Trial) -> None:
        """The worker compares it with the last one."""
        value = _progress(trial)
        trial.expect(type(value) is int and value >= 0, f"progress() is {value!r}", _at(trial))

    def test_an_idle_engine_makes_no_progress(self, trial: Trial) -> None:
        """Progress without work hides a stall: the worker waits for an engine that will never answer."""
        _progress(trial)

        async def check() -> int:
            await asyncio.sleep(_SETTLE)
            before = _progress(trial)
            await asyncio.sleep(_SILENCE)
            return _progress(trial) - before

        grown = trial.run(check())
        trial.expect(grown == 0, f"progress() grew by {grown} in {_SILENCE} s without a request", _at(trial))

    def test_progress_does_not_decrease(self, trial: Trial) -> None:
        """The worker takes any change for a step."""
        values = [_progress(trial)]
        for _ in range(3):
            trial.answer(4)
            values.append(_progress(trial))
        trial.expect(values == sorted(values), f"progress() went {values}", _at(trial))
