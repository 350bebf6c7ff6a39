"""Checks that an engine never blocks the event loop, on which all requests, probes and signals are handled."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import HasCanary, ReportsProgress
from dynamo_worker.testing.source_locations import BLOCKED_SECONDS, LoopWatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dynamo_worker.testing.trial import Trial

#: A block counts if it comes back this often: a busy machine is no bug of the engine.
_ROUNDS = 3
#: Tokens of a long prompt.
_LONG_PROMPT = 1000


def _check(trial: Trial, work: Callable[[], Awaitable[Any]]) -> None:
    """Do something several times; blocking the loop each time is a finding."""

    async def watched() -> LoopWatch:
        with LoopWatch() as watch:
            await work()
            await asyncio.sleep(0.02)
        return watch

    limit = BLOCKED_SECONDS
    for _ in range(_ROUNDS):
        watch = trial.run(watched())
        if watch.longest < limit:
            return
    raise trial.finding(f"the event loop was blocked for {watch.longest:.2f} s; at most {limit} s", watch.where)


class EventLoopChecks:
    """What runs on the event loop while the worker serves."""

    def test_generate_does_not_block_the_loop(self, trial: Trial) -> None:
        """While the loop is blocked, no other request gets a token, and probes and signals get no answer."""
        _check(trial, lambda: trial.ask(trial.request(12, prompt=1)))

    def test_many_requests_do_not_block_the_loop(self, trial: Trial) -> None:
        """Work that is short for one request is long for hundreds."""
        _check(trial, lambda: asyncio.gather(*(trial.ask(trial.request(8, prompt=n)) for n in range(1, 9))))

    def test_a_long_prompt_does_not_block_the_loop(self, trial: Trial) -> None:
        """Prompts of 100 000 tokens are common: what is done for each token on the loop adds up."""

        def work() -> Awaitable[Any]:
            request = trial.request(2, prompt=1)
            length = min(_LONG_PROMPT, ((trial.info and trial.info.context_length) or _LONG_PROMPT) // 2)
            return trial.ask(trial.dialect.lengthened(request, length))

        _check(trial, work)

    def test_a_cancellation_does_not_block_the_loop(self, trial: Trial) -> None:
        """Waiting for the engine's answer to an abort belongs into a coroutine."""

        async def work() -> None:
            name = trial.name()
            await trial.cancelled(2, name)
            await trial.engine.abort(name)

        _check(trial, work)

    def test_check_health_does_not_block_the_loop(self, trial: Trial) -> None:
        """It is called every few seconds, in the middle of all requests."""
        _check(trial, lambda: trial.plugins.check_health(trial.engine, timeout=10))

    def test_drain_does_not_block_the_loop(self, trial: Trial) -> None:
        """The requests in flight must finish during the drain."""
        _check(trial, lambda: trial.plugins.drain(trial.engine, Deadline.after(10)))

    def test_plain_methods_are_quick(self, trial: Trial) -> None:
        """The worker calls them on the event loop, ``progress`` several times a second."""
        engine = trial.engine
        methods: list[Callable[[], object]] = [engine.processes]
        methods += [engine.progress] if isinstance(engine, ReportsProgress) else []
        methods += [engine.canary_request] if isinstance(engine, HasCanary) else []

        async def check() -> None:
            for method in methods:
                times = []
                for _ in range(_ROUNDS):
                    started = time.monotonic()
                    method()
                    times.append(time.monotonic() - started)
                trial.expect(min(times) < BLOCKED_SECONDS, f"it took {min(times):.2f} s", method)

        trial.run(check())
