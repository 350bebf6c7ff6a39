"""Checks of the canary request, with which the worker warms the engine up and finds out whether it is alive."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dynamo_worker.engine import HasCanary
from dynamo_worker.errors import InvalidRequestError

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial


class CanaryChecks:
    """``canary_request``."""

    def test_the_canary_is_a_valid_request(self, trial: Trial) -> None:
        """The worker checks it like a client's request: a wrong one fails the start."""
        try:
            trial.kind.checked(trial.canary())
        except InvalidRequestError as error:
            raise trial.finding(f"canary_request: {error}") from error

    def test_each_canary_is_an_object_of_its_own(self, trial: Trial) -> None:
        """The engine may change a request: a canary that is shared becomes another one."""
        engine = trial.engine
        assert isinstance(engine, HasCanary)
        first, second = engine.canary_request(), engine.canary_request()
        trial.expect(first is not second, "two calls returned the same dict", engine.canary_request)
        trial.expect(first == second, "two calls returned different requests", engine.canary_request)

    def test_the_canary_asks_for_one_token(self, trial: Trial) -> None:
        """A longer canary holds up clients and takes longer than the stall detection allows."""
        limit = trial.dialect.limit(trial.canary())
        what = "max_tokens is" if trial.dialect.streams else "number of inputs is"
        trial.expect(limit == 1, f"its {what} {limit!r}", getattr(trial.engine, "canary_request", None))

    def test_the_canary_is_answered(self, trial: Trial) -> None:
        """An engine whose canary fails never becomes ready."""
        answer = trial.run(trial.ask(trial.canary(), "canary-1"), where=trial.engine.generate)
        trial.expect(answer.refusal is None, f"it was refused: {answer.refusal}", trial.engine.generate)
        one = answer.made == 1 or not trial.dialect.streams
        trial.expect(one, f"the answer has {answer.made} tokens")

    def test_the_canary_is_answered_beside_requests(self, trial: Trial) -> None:
        """A canary that waits for all other requests takes a busy engine for a dead one."""

        async def check() -> Answer:
            name = trial.name()
            other = asyncio.ensure_future(trial.ask(trial.request(60, prompt=1), name))
            answer = await trial.ask(trial.canary(), "canary-2")
            await other
            return answer

        answer = trial.run(check(), where=trial.engine.generate)
        trial.expect(answer.reasons, "the canary got no answer", trial.engine.generate)

    def test_a_cancelled_canary_leaves_the_engine_well(self, trial: Trial) -> None:
        """The worker cancels a canary that is late."""

        async def check() -> Answer:
            await trial.cancelled(0, "canary-3", trial.canary())
            await trial.engine.abort("canary-3")
            return await trial.ask(trial.canary(), "canary-4")

        trial.expect(trial.run(check()).reasons, "the next canary got no answer", trial.engine.generate)
