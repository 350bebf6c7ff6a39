"""Checks of errors: a wrong request is refused or survived, and harms no other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial

#: What any client may put into a prompt.
_PROMPTS: dict[str, list[Any]] = {
    "the largest id": [2**31 - 1],
    "an id just above the vocabulary": [],
    "a negative id": [-1],
    "no token": [],
    "a token that is text": ["x"],
    "a token that is true": [True],
}


def _prompt(trial: Trial, kind: str) -> list[Any]:
    if kind == "an id just above the vocabulary":
        assert trial.info is not None
        return [trial.info.vocab_size or 2**20]
    return list(_PROMPTS[kind])


class ErrorChecks:
    """Requests that are wrong."""

    @only("tokens")
    @pytest.mark.parametrize("kind", _PROMPTS)
    def test_a_wrong_token_does_not_kill_the_engine(self, trial: Trial, kind: str) -> None:
        """Any client can send such a prompt: one request must not end the worker and all other answers."""
        request = trial.request(2)
        request["token_ids"] = _prompt(trial, kind)
        answer = trial.run(trial.ask(request), where=trial.engine.generate)
        trial.expect(answer.refusal is not None or answer.chunks, "neither answer nor refusal", trial.engine.generate)
        trial.expect(trial.answer(2).reasons, "the next request got no answer", trial.engine.generate)

    @only("tokens")
    def test_a_prompt_beyond_the_context_is_refused(self, trial: Trial) -> None:
        """Engines fail in their own ways at a prompt that does not fit; the client must get HTTP 400."""
        assert trial.info is not None
        length = trial.info.context_length
        if length is None or length > 300_000:
            trial.skip("the context length is unknown or too long")
        request = trial.request(2)
        request["token_ids"] = [request["token_ids"][0]] * (length + 1)
        answer = trial.run(trial.ask(request), where=trial.engine.generate)
        trial.expect(answer.refusal is not None, f"a prompt of {length + 1} tokens was answered")

    def test_one_bad_request_harms_no_other(self, trial: Trial) -> None:
        """Requests share a batch: the error of one must not end the others."""

        async def check() -> Answer:
            other = asyncio.ensure_future(trial.ask(trial.request(40, prompt=1)))
            for _ in range(3):
                bad = trial.request(2, sampling_options={"temperature": "hot"}, output_options={"logprobs": "all"})
                await trial.ask(bad)
            return await other

        made = trial.run(check(), where=trial.engine.generate).made
        trial.expect(made == 40, f"the other answer has {made} of 40 tokens", trial.engine.generate)

    def test_a_refusal_has_a_message(self, trial: Trial) -> None:
        """The client sees the message and nothing else."""
        answer = trial.answer(2, sampling_options={"guided_decoding": {"regex": 7}})
        if answer.refusal is None:
            trial.skip("the engine does not refuse this request")
        trial.expect(len(answer.refusal) > 10, f"the message is {answer.refusal!r}", trial.engine.generate)

    def test_a_refused_request_can_be_aborted(self, trial: Trial) -> None:
        """The engine must not remember a request that it refused."""

        async def check() -> None:
            name = trial.name()
            await trial.ask(trial.request(2, sampling_options={"n": "two"}), name)
            await trial.engine.abort(name)

        trial.run(check(), where=trial.engine.abort)
