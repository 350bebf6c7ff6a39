"""An abort waits for the KV cache of its request, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dynamo_worker.kit import deferred_aborts
from dynamo_worker.kit.deferred_aborts import DeferredAborts


class Engine:
    """Notes its aborts."""

    def __init__(self) -> None:
        self.aborted = 0
        self.error: Exception | None = None
        self.begun = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.aborts = DeferredAborts(lambda work: self.tasks.append(asyncio.ensure_future(work)))

    async def take(self) -> None:
        self.aborted += 1
        if self.error is not None:
            raise self.error

    async def abort(self) -> None:
        await asyncio.wait_for(self.aborts.abort("r", self.begun, self.take), 0.5)


def run(check: Callable[[Engine], Awaitable[Any]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(check(Engine()), 10)

    asyncio.run(main())


def test_a_request_that_has_begun_is_aborted_at_once() -> None:
    async def check(engine: Engine) -> None:
        engine.begun.set()
        await engine.abort()
        assert (engine.aborted, engine.tasks) == (1, [])
        engine.error = ValueError("broken")
        with pytest.raises(ValueError, match="broken"):
            await engine.abort()

    run(check)


def test_one_that_has_not_is_aborted_with_its_first_token() -> None:
    async def check(engine: Engine) -> None:
        await engine.abort()  # returns: the host gives an abort only 10 s
        await asyncio.sleep(0.02)
        assert engine.aborted == 0
        engine.begun.set()
        await asyncio.gather(*engine.tasks)
        assert engine.aborted == 1

    run(check)


def test_one_that_never_begins_is_aborted_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its prefill worker is dead, and nobody has told the connector."""
    monkeypatch.setattr(deferred_aborts, "_TRANSFER_SECONDS", 0.05)

    async def check(engine: Engine) -> None:
        await engine.abort()
        await asyncio.gather(*engine.tasks)
        assert engine.aborted == 1

    run(check)
    assert "The KV cache of an aborted request has not arrived" in caplog.text


def test_a_shutdown_does_not_wait_for_it() -> None:
    async def check(engine: Engine) -> None:
        await engine.abort()
        (task,) = engine.tasks
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.cancelled()
        assert engine.aborted == 0

    run(check)


def test_an_error_of_a_late_abort_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def check(engine: Engine) -> None:
        engine.error = ValueError("broken")
        await engine.abort()
        engine.begun.set()
        await asyncio.gather(*engine.tasks)

    run(check)
    assert "Abort failed" in caplog.text
    assert "broken" in str(vars(caplog.records[-1]))
