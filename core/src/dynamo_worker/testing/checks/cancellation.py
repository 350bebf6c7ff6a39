"""Checks of cancelled and aborted requests: the work really stops, and nothing else does."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import LocalContext, ReportsProgress
from dynamo_worker.testing.trial import LONG

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial

#: Seconds for the report of the last step: some engines count steps in statistics that come every second.
_LAST_REPORT = 2.0
#: Seconds without a step after which an engine is idle.
_SILENCE = 0.4
#: Most steps for a request that is aborted after a few tokens; its rest would be more than a thousand.
_MOST_STEPS = 150


class CancellationChecks:
    """What is left of a request whose client is gone."""

    def test_a_cancelled_request_ends_promptly(self, trial: Trial) -> None:
        """The worker waits for the end before it calls ``abort``: until then the engine works for nobody."""

        async def check() -> float:
            name = trial.name()
            seconds = await trial.cancelled(3, name)
            await trial.engine.abort(name)
            return seconds

        seconds = trial.run(check())
        limit = 0.5 * trial.subject.patience
        trial.expect(seconds < limit, f"generate took {seconds:.2f} s to end after its cancellation; at most {limit}")

    def test_the_work_of_a_cancelled_request_stops(self, trial: Trial) -> None:
        """An engine that ignores ``abort`` fills its batch with requests of clients that are gone."""
        engine = trial.engine
        if not isinstance(engine, ReportsProgress):
            trial.skip("the engine reports no progress()")

        async def check() -> tuple[int, bool]:
            name, before = trial.name(), engine.progress()
            await trial.cancelled(3, name)
            await engine.abort(name)
            deadline, last = Deadline.after(_LAST_REPORT * trial.subject.patience), -1
            while (now := engine.progress()) != last and not deadline.passed:
                last = now
                await asyncio.sleep(_SILENCE)
            return now - before, now == last

        steps, silent = trial.run(check(), where=engine.abort)
        trial.expect(silent, f"it still steps {_LAST_REPORT} s after its only request was aborted", engine.abort)
        trial.expect(
            steps <= _MOST_STEPS,
            f"{steps} steps for a request that was aborted after 3 chunks; at most {_MOST_STEPS}",
            engine.abort,
        )

    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_the_next_request_is_well_after_a_cancellation(self, trial: Trial, after: int) -> None:
        """Clients disconnect all the time, before the first token too."""

        async def check() -> Answer:
            name = trial.name()
            await trial.cancelled(after, name)
            await trial.engine.abort(name)
            return await trial.ask(trial.request(12, prompt=1))

        plain = trial.plain().content()
        tokens = trial.run(check(), where=trial.engine.abort).content()
        trial.expect(tokens == plain, f"the next answer is {tokens} instead of {plain}", trial.engine.abort)

    def test_an_abort_ends_no_other_request(self, trial: Trial) -> None:
        """One client that leaves must not cut the answers of the others."""

        async def check() -> Answer:
            other = asyncio.ensure_future(trial.ask(trial.request(80, prompt=1)))
            name = trial.name()
            await trial.cancelled(2, name)
            await trial.engine.abort(name)
            return await other

        made = trial.run(check(), where=trial.engine.abort).made
        trial.expect(made == 80, f"the other answer has {made} of 80 tokens", trial.engine.abort)

    @pytest.mark.parametrize("name", ["never-seen", "", "x" * 300])
    def test_an_abort_of_an_unknown_id_does_nothing(self, trial: Trial, name: str) -> None:
        """A request may be cancelled before the engine has seen it."""
        trial.run(trial.engine.abort(name), where=trial.engine.abort)

    def test_an_abort_of_a_finished_request_does_nothing(self, trial: Trial) -> None:
        """A client may leave while the last token is on its way."""
        name = trial.name()
        trial.run(trial.ask(trial.request(2), name))
        trial.run(trial.engine.abort(name), where=trial.engine.abort)

    def test_an_abort_may_come_twice(self, trial: Trial) -> None:
        """The worker promises that ``abort`` follows an early end, not that it comes once."""

        async def check() -> None:
            name = trial.name()
            await trial.cancelled(2, name)
            await trial.engine.abort(name)
            await trial.engine.abort(name)

        trial.run(check(), where=trial.engine.abort)

    def test_an_abort_returns_promptly(self, trial: Trial) -> None:
        """The worker gives up on an abort after 10 s and logs it; thousands come at once in a handoff."""

        async def check() -> float:
            name = trial.name()
            await trial.cancelled(2, name)
            started = time.monotonic()
            await trial.engine.abort(name)
            return time.monotonic() - started

        seconds, limit = trial.run(check(), 3.0, trial.engine.abort), trial.subject.patience
        trial.expect(seconds < limit, f"abort took {seconds:.2f} s; at most {limit}", trial.engine.abort)

    def test_an_aborted_id_can_be_used_again(self, trial: Trial) -> None:
        """A request that is handed off may come back under its id."""

        async def check() -> Answer:
            name = trial.name()
            await trial.cancelled(2, name)
            await trial.engine.abort(name)
            await asyncio.sleep(_SILENCE)  # aborts may be on their way, and are known by the id alone
            return await trial.ask(trial.request(3, prompt=1), name)

        made = trial.run(check(), where=trial.engine.abort).made
        trial.expect(made == 3, f"the second request of that id has {made} of 3 tokens", trial.engine.abort)

    def test_an_iterator_may_be_closed_early(self, trial: Trial) -> None:
        """The worker closes the iterator of a request that it hands off."""

        async def check() -> Answer:
            name = trial.name()
            await trial.ask(trial.request(LONG, prompt=2), name, most=2)
            await trial.engine.abort(name)
            return await trial.ask(trial.request(3, prompt=1))

        made = trial.run(check(), where=trial.engine.generate).made
        trial.expect(made == 3, f"the next answer has {made} of 3 tokens", trial.engine.generate)

    def test_an_iterator_may_never_be_iterated(self, trial: Trial) -> None:
        """A client may leave before the worker asks for the first chunk."""

        async def check() -> Answer:
            name = trial.name()
            stream = trial.engine.generate(trial.request(LONG, prompt=2), LocalContext(name))
            if hasattr(stream, "aclose"):
                await stream.aclose()
            await trial.engine.abort(name)
            return await trial.ask(trial.request(3, prompt=1))

        made = trial.run(check(), where=trial.engine.generate).made
        trial.expect(made == 3, f"the next answer has {made} of 3 tokens", trial.engine.generate)

    def test_many_cancellations_at_once(self, trial: Trial) -> None:
        """A frontend that dies takes all of its requests with it."""

        async def check() -> Answer:
            names = [trial.name() for _ in range(20)]
            await asyncio.gather(*(trial.cancelled(number % 3, name) for number, name in enumerate(names)))
            await asyncio.gather(*map(trial.engine.abort, names))
            return await trial.ask(trial.request(12, prompt=1))

        tokens = trial.run(check(), where=trial.engine.abort).content()
        trial.expect(tokens == trial.plain().content(), f"the next answer is {tokens}", trial.engine.abort)

    def test_a_request_that_waits_can_be_cancelled(self, trial: Trial) -> None:
        """A request in the engine's queue must leave it when its client does."""

        async def check() -> Answer:
            running = [trial.name() for _ in range(8)]
            tasks = [asyncio.ensure_future(trial.ask(trial.request(40, prompt=3), name)) for name in running]
            name = trial.name()
            await trial.cancelled(0, name)
            await trial.engine.abort(name)
            await asyncio.gather(*tasks)
            return await trial.ask(trial.request(3, prompt=1))

        made = trial.run(check(), where=trial.engine.abort).made
        trial.expect(made == 3, f"the next answer has {made} of 3 tokens", trial.engine.abort)
