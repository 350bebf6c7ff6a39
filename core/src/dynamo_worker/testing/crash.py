"""The death of an engine: what it does when one of its processes is killed in the middle of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.errors import describe

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial


class Crash:
    """What an engine did when one of its processes was killed. The engine is cleaned up afterwards.

    :param trial: a started engine, which is used up.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        #: The answers to the request in flight and to a later one; None if they raised, or were still awaited.
        self.answer: Answer | None = None
        self.later: Answer | None = None
        #: What the health check raised; None if it raised nothing.
        self.health: BaseException | None = None
        #: What the cleanup raised, and how long it took in seconds.
        self.cleanup: str | None = None
        self.cleanup_seconds = 0.0
        trial.loop.run_until_complete(self._die())
        trial.close(clean=False)

    async def _die(self) -> None:
        trial = self.trial
        name = trial.name()
        # An answer that is not streamed is computed at once: it takes that many tokens to be in the middle of it.
        tokens = 500 if trial.dialect.streams else 200_000
        asking = asyncio.ensure_future(trial.ask(trial.request(tokens, prompt=1), name))
        await asyncio.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(list(trial.engine.processes())[-1], signal.SIGKILL)
        self.answer = await self._answer(asking)
        self.later = await self._answer(asyncio.ensure_future(trial.ask(trial.request(2))))
        self.health = await self._raised(asyncio.ensure_future(self._healthy()))
        started = time.monotonic()
        try:
            await trial.cleanup()
        except AssertionError as error:
            self.cleanup = describe(error)
        self.cleanup_seconds = time.monotonic() - started

    async def _healthy(self) -> None:
        for outcome in await self.trial.plugins.check_health(self.trial.engine, timeout=5):
            if outcome.error is not None:
                raise outcome.error

    async def _answer(self, task: asyncio.Task[Answer]) -> Answer | None:
        error = await self._raised(task)
        return task.result() if error is None and task.done() and not task.cancelled() else None

    async def _raised(self, task: asyncio.Task[Any]) -> BaseException | None:
        done, _ = await asyncio.wait({task}, timeout=3.0 * self.trial.subject.patience)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=1)
            return None
        return asyncio.CancelledError() if task.cancelled() else task.exception()
