"""Checks of log probabilities: there if asked for, in the right shape, and not otherwise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dynamo_worker.responses import TopLogprob
from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial

#: How many of the likeliest tokens the checks ask for.
_TOP = 2


def _answer(trial: Trial) -> Answer:
    answer = trial.answer(5, output_options={"logprobs": _TOP})
    if answer.refusal is not None:
        trial.skip(f"refused: {answer.refusal}")
    return answer


def _chunks(trial: Trial) -> list[dict[str, Any]]:
    return [chunk for chunk in _answer(trial).chunks if chunk.get("token_ids")]


@only("tokens")
class LogProbabilityChecks:
    """``log_probs`` and ``top_logprobs`` of an engine that has them; one that has not must refuse."""

    def test_log_probabilities_are_there_or_refused(self, trial: Trial) -> None:
        """A client that asks for them and gets none cannot tell whether the engine or its own code is wrong."""
        lacking = [chunk for chunk in _chunks(trial) if not chunk.get("log_probs")]
        trial.expect(
            not lacking,
            f"output_options.logprobs was neither honoured nor refused: {lacking[:1]!r:.100}",
            trial.engine.generate,
        )

    def test_each_token_has_a_log_probability(self, trial: Trial) -> None:
        """The frontend pairs tokens and log probabilities by position: one too many shifts all the others."""
        for chunk in _chunks(trial):
            tokens, values = len(chunk["token_ids"]), len(chunk.get("log_probs") or ())
            trial.expect(values == tokens, f"{tokens} tokens, {values} log_probs", trial.engine.generate)

    def test_log_probabilities_are_not_positive(self, trial: Trial) -> None:
        """A probability above 1 breaks every sum that a client makes of them."""
        for chunk in _chunks(trial):
            for value in chunk.get("log_probs") or ():
                right = isinstance(value, float) and math.isfinite(value) and value <= 1e-6
                trial.expect(right, f"a log probability is {value!r}", trial.engine.generate)

    def test_each_token_has_its_likeliest_tokens(self, trial: Trial) -> None:
        """The frontend pairs them with the tokens by position."""
        for chunk in _chunks(trial):
            tokens, lists = len(chunk["token_ids"]), len(chunk.get("top_logprobs") or ())
            trial.expect(lists == tokens, f"{tokens} tokens, {lists} lists of top_logprobs", trial.engine.generate)

    def test_likeliest_tokens_are_described(self, trial: Trial) -> None:
        """The runtime cannot decode an entry with a missing or a misspelt field: the request fails."""
        for chunk in _chunks(trial):
            for entry in (entry for entries in chunk.get("top_logprobs") or () for entry in entries):
                right = isinstance(entry, dict) and {"rank", "token_id", "logprob"} <= entry.keys()
                trial.expect(
                    right and entry.keys() <= TopLogprob.__annotations__.keys(),
                    f"an entry of top_logprobs is {entry!r:.100}",
                    trial.engine.generate,
                )

    def test_the_chosen_token_is_among_the_likeliest(self, trial: Trial) -> None:
        """Clients look the chosen token up in the list."""
        for chunk in _chunks(trial):
            for token, entries in zip(chunk["token_ids"], chunk.get("top_logprobs") or (), strict=False):
                listed = [entry.get("token_id") for entry in entries]
                trial.expect(token in listed, f"the token {token} is not in {listed}", trial.engine.generate)

    def test_no_log_probabilities_unless_asked_for(self, trial: Trial) -> None:
        """They cost time and more bytes than the text, for every client."""
        for chunk in trial.plain().chunks:
            for name in ("log_probs", "top_logprobs"):
                trial.expect(not chunk.get(name), f"a plain answer has {name}", trial.engine.generate)

    def test_log_probabilities_change_no_token(self, trial: Trial) -> None:
        """Asking for log probabilities must not change the answer."""
        answer, plain = _answer(trial).content(), trial.plain().content()
        trial.expect(answer == plain[:5], f"{answer} instead of {plain[:5]}", trial.engine.generate)

    def test_prompt_log_probabilities_are_there_or_refused(self, trial: Trial) -> None:
        """A client that asks for them and gets none cannot tell why."""
        answer = trial.answer(2, output_options={"prompt_logprobs": 1})
        if answer.refusal is not None:
            trial.skip(f"refused: {answer.refusal}")
        found = [(chunk.get("engine_data") or {}).get("prompt_logprobs") for chunk in answer.chunks]
        trial.expect(
            any(found), "output_options.prompt_logprobs was neither honoured nor refused", trial.engine.generate
        )
        expected, got = len(answer.request["token_ids"]), len(next(filter(None, found)))
        trial.expect(got == expected, f"{expected} tokens in the prompt, {got} entries", trial.engine.generate)
