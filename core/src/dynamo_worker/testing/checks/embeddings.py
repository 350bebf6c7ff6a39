"""Checks of engines that make embeddings: which vector belongs to which input, and what the numbers are."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest

from dynamo_worker.host.requests.embedding_kind import wrong_answer
from dynamo_worker.testing.dialects import Vectors, numbers, only

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_worker.embeddings import EmbeddingSpec
    from dynamo_worker.testing.trial import Answer, Trial

#: Tokens of the inputs of a batch: of different lengths, so that an engine that sorts them shows it.
_LENGTHS = (7, 1, 12, 3, 9)


def _spec(trial: Trial) -> EmbeddingSpec:
    assert trial.info is not None
    assert trial.info.embeddings is not None
    return trial.info.embeddings


def _ask(trial: Trial, inputs: Sequence[Any], **fields: Any) -> Answer:
    return trial.run(trial.ask({**trial.canary(), "inputs": list(inputs), **fields}), where=trial.engine.generate)


def _batch(trial: Trial) -> list[Any]:
    return [one for number, length in enumerate(_LENGTHS, 1) for one in trial.request(length, prompt=number)["inputs"]]


def _answered(trial: Trial, answer: Answer) -> Mapping[str, Any]:
    """Return the only chunk of an answer; the first of several."""
    trial.expect(answer.refusal is None, f"refused: {answer.refusal}", trial.engine.generate)
    trial.expect(answer.chunks, "there is no answer", trial.engine.generate)
    chunk = answer.chunks[0]
    trial.expect(isinstance(chunk, dict), f"the answer is {chunk!r:.100}", trial.engine.generate)
    found: Mapping[str, Any] = chunk
    return found


def _vectors(trial: Trial, answer: Answer) -> list[tuple[float, ...]]:
    vectors = _answered(trial, answer).get("embeddings")
    right = isinstance(vectors, (list, tuple))
    trial.expect(right, f"embeddings is {vectors!r:.100}", trial.engine.generate)
    return [numbers(vector) for vector in vectors or ()]


@only("embeddings")
class EmbeddingChecks:
    """What an embedding engine answers."""

    def test_an_answer_comes_in_one_piece(self, trial: Trial) -> None:
        """The frontend understands one answer: a second one is HTTP 500, and none is an empty list with HTTP 200."""
        chunks = _ask(trial, _batch(trial)).chunks
        trial.expect(len(chunks) == 1, f"the answer has {len(chunks)} chunks", trial.engine.generate)

    def test_each_input_has_its_vector(self, trial: Trial) -> None:
        """A vector too few shifts all others: the client stores them with the wrong texts, and nobody notices."""
        inputs = _batch(trial)
        count = len(_vectors(trial, _ask(trial, inputs)))
        trial.expect(count == len(inputs), f"{count} vectors for {len(inputs)} inputs", trial.engine.generate)

    def test_vectors_have_the_promised_dimensions(self, trial: Trial) -> None:
        """Clients make the columns of their databases as long as ``EmbeddingSpec.dimensions``."""
        expected = _spec(trial).dimensions
        for vector in _vectors(trial, _ask(trial, _batch(trial))):
            got = len(vector)
            trial.expect(got == expected, f"a vector has {got} dimensions, expected {expected}", trial.engine.generate)

    def test_numbers_are_finite(self, trial: Trial) -> None:
        """JSON has no NaN, and one poisons every search in the client's database."""
        for vector in _vectors(trial, _ask(trial, _batch(trial))):
            wrong = [number for number in vector if not math.isfinite(number)]
            trial.expect(not wrong, f"a vector has {wrong[:3]}", trial.engine.generate)

    def test_an_answer_can_be_encoded(self, trial: Trial) -> None:
        """The worker answers HTTP 500 in the place of anything that is no answer to the request."""
        answer = _ask(trial, _batch(trial))
        wrong = wrong_answer(_answered(trial, answer), answer.request, _spec(trial))
        trial.expect(wrong is None, f"the answer {wrong}", trial.engine.generate)

    def test_vectors_are_in_the_order_of_the_inputs(self, trial: Trial) -> None:
        """Engines sort a batch by length; a client that gets it back like that searches for the wrong texts."""
        inputs = _batch(trial)
        alone = Vectors(vector for one in inputs for vector in _vectors(trial, _ask(trial, [one])))
        together = Vectors(_vectors(trial, _ask(trial, inputs)))
        for number, (expected, got) in enumerate(zip(alone, together, strict=False)):
            right = Vectors([expected]) == Vectors([got])
            trial.expect(right, f"vector {number} of a batch is not that of its input alone", trial.engine.generate)

    def test_different_inputs_have_different_vectors(self, trial: Trial) -> None:
        """Vectors that depend on the length alone, or on nothing, look right and find nothing."""
        first, second = (trial.request(5, prompt=number)["inputs"][0] for number in (1, 2))
        one, other = _vectors(trial, _ask(trial, [first, second]))
        trial.expect(one != other, f"{first} and {second} have the same vector", trial.engine.generate)

    def test_the_same_input_has_the_same_vector(self, trial: Trial) -> None:
        """What is found today must be found tomorrow."""
        one, other = (Vectors(_vectors(trial, _ask(trial, _batch(trial)))) for _ in range(2))
        trial.expect(one == other, f"{one} and then {other}", trial.engine.generate)

    def test_tokens_are_counted(self, trial: Trial) -> None:
        """Clients are billed by ``usage``, and for embeddings nobody else counts."""
        inputs = _batch(trial)
        expected, got = sum(map(len, inputs)), _answered(trial, _ask(trial, inputs)).get("prompt_tokens")
        trial.expect(got == expected, f"prompt_tokens: expected {expected}, got {got!r}", trial.engine.generate)

    @pytest.mark.parametrize("size", ["half", "one"])
    def test_vectors_can_be_shorter(self, trial: Trial, size: str) -> None:
        """``EmbeddingSpec.shorter`` promises it to clients: a vector of another length is HTTP 500."""
        spec = _spec(trial)
        if not spec.shorter:
            trial.skip("the engine's vectors have one length")
        sizes = sorted(range(1, spec.dimensions) if isinstance(spec.shorter, bool) else spec.shorter)
        dimensions = sizes[len(sizes) // 2] if size == "half" else sizes[0]
        for vector in _vectors(trial, _ask(trial, _batch(trial), dimensions=dimensions)):
            trial.expect(
                len(vector) == dimensions, f"dimensions is {dimensions}, got {len(vector)}", trial.engine.generate
            )
        after = len(_vectors(trial, _ask(trial, _batch(trial)))[0])
        trial.expect(after == spec.dimensions, f"the next answer has {after} dimensions", trial.engine.generate)

    def test_texts_are_taken(self, trial: Trial) -> None:
        """An engine with ``model_input`` ``text`` gets what clients send, and clients send texts."""
        assert trial.info is not None
        if trial.info.model_input != "text":
            trial.skip("the frontend tokenizes")
        answer = _ask(trial, ["a text", "another"])
        count, tokens = len(_vectors(trial, answer)), _answered(trial, answer).get("prompt_tokens")
        trial.expect(count == 2 and tokens, f"{count} vectors, {tokens} tokens", trial.engine.generate)
        cut = _answered(trial, _ask(trial, ["a text with many words"], truncate_prompt_tokens=1)).get("prompt_tokens")
        trial.expect(cut == 1, f"truncate_prompt_tokens is 1; {cut} tokens were read", trial.engine.generate)

    def test_a_batch_of_many_inputs_is_answered(self, trial: Trial) -> None:
        """Clients send as many as ``EmbeddingSpec.most_inputs`` allows, however small the engine's batch is."""
        count = min(_spec(trial).most_inputs, 200)
        one = trial.request(1)["inputs"][0]
        got = len(_vectors(trial, _ask(trial, [one] * count)))
        trial.expect(got == count, f"{got} vectors for {count} inputs", trial.engine.generate)

    def test_a_small_batch_does_not_wait_for_a_large_one(self, trial: Trial) -> None:
        """One client that embeds a library must not keep all others waiting until it has finished."""

        async def check() -> bool:
            large = asyncio.ensure_future(trial.ask(trial.request(1500, prompt=3)))
            await asyncio.sleep(0.02)
            if large.done():
                await large
                return True
            await trial.ask(trial.request(1, prompt=1))
            waited = large.done()
            await large
            return not waited

        for _ in range(2):
            if trial.run(check(), 60.0, trial.engine.generate):
                return
        raise trial.finding("a request of one token was answered after 1500 others each time", trial.engine.generate)
