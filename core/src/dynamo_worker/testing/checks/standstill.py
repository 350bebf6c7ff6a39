"""Checks of an engine that stands still: it does not claim to work, and goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from dynamo_worker.engine import ReportsProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_worker.testing.trial import Answer, Trial

#: Seconds for what was on its way when the engine was stopped.
_SETTLE = 0.3
#: Seconds during which a stopped engine is watched.
_SILENCE = 0.5


@contextlib.contextmanager
def _stopped(trial: Trial) -> Iterator[None]:
    pids = list(trial.engine.processes())
    if not pids:
        trial.skip("the engine has no processes")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class StandstillChecks:
    """An engine whose processes are stopped, as a device that hangs stops them."""

    def test_a_stopped_engine_makes_no_progress(self, trial: Trial) -> None:
        """Progress that is claimed while nothing moves keeps a hung worker in service for ever."""
        if not isinstance(trial.engine, ReportsProgress):
            trial.skip("the engine reports no progress()")
        engine = trial.engine

        async def check() -> int:
            await asyncio.sleep(_SETTLE)
            before = engine.progress()
            await asyncio.sleep(_SILENCE)
            return engine.progress() - before

        with _stopped(trial):
            grown = trial.run(check())
        trial.expect(grown == 0, f"progress() grew by {grown} while all processes were stopped", engine.progress)

    def test_a_stopped_engine_answers_no_canary(self, trial: Trial) -> None:
        """A canary that is answered without the engine finds no stall."""

        async def check() -> bool:
            name = trial.name()
            asking = asyncio.ensure_future(trial.ask(trial.canary(), name))
            await asyncio.sleep(_SETTLE)
            answered = asking.done()
            asking.cancel()
            await asyncio.wait({asking})
            await trial.engine.abort(name)
            return answered

        with _stopped(trial):
            answered = trial.run(check())
        trial.expect(not answered, "the canary was answered while all processes were stopped", trial.engine.generate)

    def test_an_engine_goes_on_after_a_standstill(self, trial: Trial) -> None:
        """Machines are suspended and debugged: what was stopped must go on where it was."""
        plain = trial.plain().content()

        async def asked() -> Answer:
            asking = asyncio.ensure_future(trial.ask(trial.request(12, prompt=1)))
            with _stopped(trial):
                await asyncio.sleep(_SETTLE)
            return await asking

        tokens = trial.run(asked(), where=trial.engine.generate).content()
        trial.expect(tokens == plain, f"the answer is {tokens} instead of {plain}", trial.engine.generate)
