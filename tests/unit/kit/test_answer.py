"""How an answer that an engine pushes ends: once, with its last chunk or with an error."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_worker.engine import Chunk
from dynamo_worker.kit.answer import Answer


def test_an_answer_ends_once() -> None:
    async def check() -> None:
        chunks: list[Chunk] = []
        answer = Answer(chunks.append)
        answer.send({"token_ids": [1]})
        assert (answer.over, answer.begun.is_set()) == (False, False)
        answer.complete()
        answer.fail(ValueError("too late"))
        assert (answer.over, answer.begun.is_set()) == (True, True)
        await answer.wait()
        assert chunks == [{"token_ids": [1]}]

    asyncio.run(check())


def test_an_answer_fails_with_its_first_error(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        answer = Answer(lambda _: None)
        answer.fail(ValueError("first"))
        answer.fail(ValueError("second"))
        answer.complete()
        with pytest.raises(ValueError, match="first"):
            await answer.wait()
        Answer(lambda _: None).fail(ValueError("nobody waits for this one"))

    asyncio.run(check())
    assert "never retrieved" not in caplog.text


def test_nothing_is_sent_to_one_who_has_left() -> None:
    async def check() -> None:
        answer = Answer(lambda _: None)
        waiting = asyncio.ensure_future(answer.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert answer.over
        answer.complete()

    asyncio.run(check())
