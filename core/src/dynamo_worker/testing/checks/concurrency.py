"""Checks of several requests: one after another, at once, and with awkward ids."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial


def _alone(trial: Trial, count: int) -> list[list[int]]:
    return [trial.answer(12, prompt=number).content() for number in range(1, count + 1)]


class ConcurrencyChecks:
    """Requests beside each other."""

    @pytest.mark.parametrize("count", [2, 8])
    def test_streams_do_not_mix(self, trial: Trial, count: int) -> None:
        """A client that gets another client's tokens is the worst leak that an engine can have."""
        alone = _alone(trial, count)

        async def together() -> list[Answer]:
            return await asyncio.gather(
                *(trial.ask(trial.request(12, prompt=number)) for number in range(1, count + 1))
            )

        for _ in range(2):
            answers = [answer.content() for answer in trial.run(together(), where=trial.engine.generate)]
            if answers == alone:
                return
        number = next(at for at in range(count) if answers[at] != alone[at])
        raise trial.finding(
            f"prompt {number + 1} of {count}: alone {alone[number]}, together {answers[number]}",
            trial.engine.generate,
        )

    def test_a_second_request_runs_beside_the_first(self, trial: Trial) -> None:
        """Workers get many requests at once; an error here loses all but one."""

        async def check() -> tuple[Answer, Answer]:
            first = asyncio.ensure_future(trial.ask(trial.request(60, prompt=1)))
            await asyncio.sleep(0.005)
            second = await trial.ask(trial.request(3, prompt=2))
            return await first, second

        first, second = trial.run(check(), where=trial.engine.generate)
        trial.expect(first.made == 60, f"the first has {first.made} of 60 tokens")
        trial.expect(second.made == 3, f"the second has {second.made} of 3 tokens")

    def test_answers_of_different_lengths_end_by_themselves(self, trial: Trial) -> None:
        """The end of a short answer must not end, or hold up, a longer one in the same batch."""
        lengths = [1, 9, 2, 17, 4]

        async def check() -> list[Answer]:
            return await asyncio.gather(*(trial.ask(trial.request(count, prompt=count)) for count in lengths))

        made = [answer.made for answer in trial.run(check(), where=trial.engine.generate)]
        trial.expect(made == lengths, f"max_tokens {lengths}, tokens {made}", trial.engine.generate)

    def test_the_second_request_is_answered(self, trial: Trial) -> None:
        """An engine that works once is healthy in every warm-up and useless afterwards."""
        for number in (1, 2):
            made = trial.answer(3, prompt=number).made
            trial.expect(made == 3, f"request {number} has {made} of 3 tokens", trial.engine.generate)

    def test_many_requests_one_after_another(self, trial: Trial) -> None:
        """State that grows with each request ends a worker after hours."""
        for number in range(20):
            made = trial.answer(1, prompt=number % 4).made
            trial.expect(made == 1, f"request {number + 1} has {made} of 1 tokens", trial.engine.generate)

    @pytest.mark.parametrize("name", ["x", "x" * 200, "a/b c\n{}", "ü-\N{GRINNING FACE}"], ids=[*"abcd"])
    def test_any_request_id_will_do(self, trial: Trial, name: str) -> None:
        """Ids come from clients' headers."""
        made = trial.run(trial.ask(trial.request(2, prompt=1), name)).made
        trial.expect(made == 2, f"the request {name!r:.40} has {made} of 2 tokens", trial.engine.generate)

    def test_a_request_id_may_come_again(self, trial: Trial) -> None:
        """A request that migrates away and back has the same id both times."""
        name = trial.name()
        for _ in range(2):
            made = trial.run(trial.ask(trial.request(2, prompt=1), name)).made
            trial.expect(made == 2, f"the answer has {made} of 2 tokens", trial.engine.generate)
