"""Checks of chunks: what ``generate`` may yield. The docstring of each check says why it matters in production."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from dynamo_worker.engine import LocalContext, PushesChunks
from dynamo_worker.host.requests import text_kind
from dynamo_worker.host.requests.engine_checks import FINISH_REASONS
from dynamo_worker.responses import Chunk
from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from collections.abc import Collection

    from dynamo_worker.testing.trial import Answer, Trial


def _dictionaries(answer: Answer) -> list[dict[str, Any]]:
    return [chunk for chunk in answer.chunks if isinstance(chunk, dict)]


def _reasons(trial: Trial) -> Collection[str]:
    """Return the finish reasons that the frontend accepts."""
    given = (name for name in text_kind.FINISH_REASONS if trial.canary().get(name) is not None)
    return next((text_kind.FINISH_REASONS[name] for name in given), FINISH_REASONS)


def _at(trial: Trial) -> Any:
    return trial.engine.generate


class ChunkChecks:
    """The chunks of one plain answer, and what follows from them."""

    def test_generate_returns_an_asynchronous_iterator(self, trial: Trial) -> None:
        """The worker iterates over the answer; anything else fails every request with HTTP 500."""

        async def check() -> None:
            stream = trial.engine.generate(trial.request(1), LocalContext(trial.name()))
            right = isinstance(stream, AsyncIterator)
            if hasattr(stream, "close"):
                stream.close()
            elif hasattr(stream, "aclose"):
                await stream.aclose()
            trial.expect(right, f"generate returned {type(stream).__name__}", trial.engine.generate)

        trial.run(check())

    def test_an_answer_has_chunks(self, trial: Trial) -> None:
        """A stream without a chunk ends as an error of the worker, and the client gets nothing."""
        trial.expect(trial.plain().chunks, "the answer has no chunk", trial.engine.generate)

    def test_chunks_are_dictionaries(self, trial: Trial) -> None:
        """The runtime encodes dictionaries; anything else ends the request with HTTP 500."""
        for chunk in trial.plain().chunks:
            trial.expect(
                isinstance(chunk, dict), f"a chunk is of type {type(chunk).__name__}: {chunk!r:.100}", _at(trial)
            )

    @only("tokens")
    def test_every_chunk_has_a_list_of_token_ids(self, trial: Trial) -> None:
        """The frontend reads ``token_ids`` of every chunk, and fails the request without it."""
        for chunk in _dictionaries(trial.plain()):
            tokens = chunk.get("token_ids")
            trial.expect(isinstance(tokens, (list, tuple)), f"token_ids is {tokens!r:.100}", _at(trial))

    @only("tokens")
    def test_token_ids_are_integers(self, trial: Trial) -> None:
        """A float, a boolean or a NumPy scalar cannot be decoded: the client's stream breaks off."""
        for chunk in _dictionaries(trial.plain()):
            for token in chunk.get("token_ids") or ():
                trial.expect(type(token) is int, f"a token id is {token!r} ({type(token).__name__})", _at(trial))

    @only("tokens")
    def test_token_ids_lie_in_the_vocabulary(self, trial: Trial) -> None:
        """The frontend has no text for an id beyond the vocabulary: the client gets an error or garbage."""
        assert trial.info is not None
        limit = trial.info.vocab_size or 2**32
        for token in trial.plain().content():
            trial.expect(
                0 <= token < limit, f"the answer has the token {token}; the vocabulary has {limit}", _at(trial)
            )

    @only("tokens")
    def test_the_engine_says_its_vocabulary(self, trial: Trial) -> None:
        """Without ``vocab_size`` the worker passes on any 32-bit token, and some engines die of an unknown one."""
        assert trial.info is not None
        trial.expect(trial.info.vocab_size, "EngineInfo.vocab_size is not set", trial.engine.start)

    @only("tokens", "text")
    def test_the_index_is_that_of_the_answer(self, trial: Trial) -> None:
        """The frontend sorts chunks by ``index``: a wrong one is a choice that the client did not ask for."""
        for chunk in _dictionaries(trial.plain()):
            index = trial.dialect.index(chunk)
            trial.expect(index in (0, None), f"the index of the only answer is {index!r}")

    @only("tokens")
    def test_fields_of_chunks_are_known(self, trial: Trial) -> None:
        """The runtime drops a field that it does not know, such as a misspelt one, without a word."""
        for chunk in _dictionaries(trial.plain()):
            unknown = chunk.keys() - Chunk.__annotations__.keys()
            trial.expect(not unknown, f"a chunk has unknown fields: {', '.join(sorted(unknown))}", _at(trial))

    def test_chunks_can_be_encoded(self, trial: Trial) -> None:
        """A NaN, an infinite number or an object in a chunk ends the request with HTTP 500."""
        for chunk in trial.plain().chunks:
            try:
                json.dumps(chunk, allow_nan=False, default=lambda value: "" if isinstance(value, bytes) else value)
            except (TypeError, ValueError, RecursionError) as error:  # noqa: PERF203 - it ends the loop
                raise trial.finding(f"a chunk cannot be encoded ({error}): {chunk!r:.200}", _at(trial)) from error

    def test_an_answer_ends_with_a_finish_reason(self, trial: Trial) -> None:
        """Without it the client sees a stream that broke off, and the frontend sends the request once more."""
        reasons = trial.plain().reasons
        trial.expect(reasons, "the answer has no finish_reason", _at(trial))

    def test_an_answer_has_one_finish_reason(self, trial: Trial) -> None:
        """Clients stop reading at the first finish reason; what follows is lost or breaks their parsers."""
        reasons = trial.plain().reasons
        trial.expect(len(reasons) < 2, f"the answer has {len(reasons)} finish reasons: {reasons}", _at(trial))

    def test_no_chunk_follows_the_finish(self, trial: Trial) -> None:
        """What comes after the finish reason never reaches the client, although it was paid for."""
        chunks, reason = trial.plain().parts, trial.dialect.reason
        at = next((at for at, chunk in enumerate(chunks) if reason(chunk) is not None), len(chunks) - 1)
        after = chunks[at + 1 :]
        trial.expect(not after, f"{len(after)} chunks follow the finish_reason: {after!r:.100}", _at(trial))

    @only("tokens", "text")
    def test_finish_reasons_are_known(self, trial: Trial) -> None:
        """The runtime cannot encode a reason that Dynamo does not have: the request ends with HTTP 500."""
        for reason in trial.plain().reasons:
            expected = _reasons(trial)
            trial.expect(
                isinstance(reason, str) and reason in expected,
                f"the finish_reason is {reason!r}; expected one of {', '.join(sorted(expected))}",
                _at(trial),
            )

    @only("tokens", "text")
    def test_the_finish_reason_at_max_tokens_is_length(self, trial: Trial) -> None:
        """Clients go on after ``length`` and not after ``stop``: with the wrong one they lose the rest."""
        for reason in trial.plain().reasons:
            trial.expect(reason == "length", f"an answer cut off at max_tokens ended with {reason!r}", _at(trial))

    @only("tokens")
    def test_chunks_have_new_tokens_only(self, trial: Trial) -> None:
        """The frontend joins chunks: one that repeats earlier tokens shows the client its text twice."""
        count = trial.plain().made
        trial.expect(count <= 12, f"max_tokens is 12, and the chunks have {count} tokens", _at(trial))

    def test_chunks_are_not_modified_afterwards(self, trial: Trial) -> None:
        """The worker encodes a chunk after it was yielded: a later change sends the client something else."""
        answer = trial.plain()
        for before, after in zip(answer.chunks, answer.originals, strict=True):
            trial.expect(before == after, f"the chunk {before!r:.100} became {after!r:.100}", _at(trial))

    def test_each_chunk_is_an_object_of_its_own(self, trial: Trial) -> None:
        """A chunk that is used twice changes while the first one still waits to be sent."""
        chunks = trial.plain().originals
        trial.expect(len({id(chunk) for chunk in chunks}) == len(chunks), "the same dict was yielded twice")

    def test_the_answer_is_for_this_request_alone(self, trial: Trial) -> None:
        """The likeliest tokens of the same prompt are the same each time, or a request depends on the one before."""
        first, again = trial.plain(), trial.answer(12)
        trial.expect(
            first.content() == again.content(),
            f"the same request was answered with {first.content()} and with {again.content()}",
            _at(trial),
        )

    def test_push_sends_what_generate_yields(self, trial: Trial) -> None:
        """The worker prefers ``push``, but canaries go to ``generate``: both must give the same answer."""
        engine = trial.engine
        if not isinstance(engine, PushesChunks):
            trial.skip("the engine does not push")
        chunks: list[Any] = []
        trial.run(engine.push(trial.request(12, prompt=1), LocalContext(trial.name()), chunks.append))
        pushed = trial.dialect.content(chunks, 0)
        trial.expect(
            pushed == trial.plain().content(), f"push: {pushed}, generate: {trial.plain().content()}", engine.push
        )

    def test_a_send_that_fails_ends_one_request_only(self, trial: Trial) -> None:
        """``send`` raises when its client is gone; the other clients must not notice."""
        engine = trial.engine
        if not isinstance(engine, PushesChunks):
            trial.skip("the engine does not push")

        def gone(_: Any) -> None:
            raise RuntimeError("the client is gone")

        async def check() -> Answer:
            name = trial.name()
            try:
                await engine.push(trial.request(12, prompt=2), LocalContext(name), gone)
            except RuntimeError:
                await engine.abort(name)
            return await trial.ask(trial.request(12, prompt=1))

        answer = trial.run(check())
        trial.expect(answer.content() == trial.plain().content(), "the next answer is another one", engine.push)
