"""Checks of an answer's length: ``max_tokens``, stop tokens, and the rest of a request that migrated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial


def _stopped(trial: Trial) -> tuple[int, int, Answer]:
    """Return the position of the first other token, the token, and the answer that has it as a stop token."""
    tokens = trial.plain().content()
    at = next((at for at, token in enumerate(tokens) if token != tokens[0]), None)
    if at is None:
        trial.skip("every token of the plain answer is the same")
    # Some engines take ignore_eos for all stop tokens.
    stop = {"stop_token_ids": [tokens[at]], "ignore_eos": False}
    answer = trial.answer(12, stop_conditions=stop)
    if answer.refusal is not None:
        trial.skip(f"refused: {answer.refusal}")
    return at, tokens[at], answer


class LengthChecks:
    """When an answer ends."""

    @pytest.mark.parametrize("tokens", [1, 2, 7, 33])
    def test_max_tokens_is_kept(self, trial: Trial, tokens: int) -> None:
        """Clients pay by the token and plan by ``max_tokens``: more is a wrong bill, fewer a cut answer."""
        made = trial.answer(tokens).made
        trial.expect(made == tokens, f"max_tokens is {tokens}; the answer has {made} tokens", trial.engine.generate)

    @only("tokens")
    def test_max_tokens_of_zero_makes_no_token(self, trial: Trial) -> None:
        """A request that migrated at its last token has ``max_tokens`` 0: any token is one too many."""
        answer = trial.answer(0)
        if answer.refusal is None:
            trial.expect(not answer.content(), f"{answer.made} tokens came", trial.engine.generate)
            trial.expect(answer.reasons == ["length"], f"it ended with {answer.reasons}", trial.engine.generate)
        else:
            raise trial.finding(f"max_tokens 0 was refused: {answer.refusal}", trial.engine.generate)

    def test_an_answer_ends_by_itself(self, trial: Trial) -> None:
        """An answer that never ends holds its place in the batch and its memory until the client gives up."""
        trial.expect(trial.plain().reasons, "the stream ended without a finish_reason", trial.engine.generate)

    @only("tokens", "text")
    def test_a_huge_max_tokens_is_bounded_by_the_context(self, trial: Trial) -> None:
        """Clients send the largest number they know; it must neither fail nor reserve memory for it."""

        async def check() -> Answer:
            name = trial.name()
            answer = await trial.ask(trial.request(2**31 - 1, prompt=1), name, most=3)
            await trial.engine.abort(name)
            return answer

        answer = trial.run(check())
        trial.expect(answer.chunks or answer.refusal, "the answer has no chunk", trial.engine.generate)

    @only("tokens")
    def test_a_stop_token_ends_the_answer(self, trial: Trial) -> None:
        """A stop condition that is ignored shows the client what it asked not to see, and wastes the GPU."""
        at, token, answer = _stopped(trial)
        made = answer.made
        trial.expect(
            made <= at + 1,
            f"the stop token {token} is token {at + 1}; the answer went on to {made}",
            trial.engine.generate,
        )

    @only("tokens")
    def test_the_finish_reason_at_a_stop_token_is_stop(self, trial: Trial) -> None:
        """Clients that see ``length`` at a stop token ask for a rest that does not exist."""
        _, token, answer = _stopped(trial)
        trial.expect(
            answer.reasons and answer.reasons[-1] in ("stop", "eos"),
            f"the answer with the stop token {token} ended with {answer.reasons}",
            trial.engine.generate,
        )

    @only("tokens")
    def test_min_tokens_is_kept(self, trial: Trial) -> None:
        """A request with ``min_tokens`` must not end at a stop token before."""
        tokens = trial.plain().content()
        stop = {"stop_token_ids": [tokens[0]], "min_tokens": 5, "ignore_eos": False}
        answer = trial.answer(12, stop_conditions=stop)
        if answer.refusal is not None:
            trial.skip(f"refused: {answer.refusal}")
        made = answer.made
        trial.expect(made >= 5, f"min_tokens is 5; the answer has {made} tokens", trial.engine.generate)

    @only("tokens")
    def test_stop_tokens_do_not_stay(self, trial: Trial) -> None:
        """A stop token of one request must not cut the next answer."""
        tokens = trial.plain().content()
        trial.answer(12, stop_conditions={"stop_token_ids": [tokens[-1]]})
        made = trial.answer(12).made
        trial.expect(made == 12, f"the next answer has {made} tokens instead of 12", trial.engine.generate)
