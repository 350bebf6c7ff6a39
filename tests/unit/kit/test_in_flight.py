"""Requests in an engine whose calls may block: handed over, answered, aborted, and given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dynamo_worker.kit import in_flight
from dynamo_worker.kit.in_flight import RequestsInFlight, TrackedAnswer


class Reply(TrackedAnswer[str]):
    """Notes which request it follows."""

    followed: str | None = None

    def follow(self, handle: str) -> None:
        self.followed = handle

    def end(self) -> None:
        self.finished.set()
        self.complete()


class Engine:
    """Notes its aborts; they are acknowledged by the test, and may be refused."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.takes_aborts = True
        self.fetches = False
        self.tasks: list[Any] = []
        self.requests: RequestsInFlight[str] = RequestsInFlight(
            "toy",
            self.aborted.append,
            may_abort=lambda: self.takes_aborts,
            run_beside=self.run_beside,
            fetches=lambda: self.fetches,
        )

    def run_beside(self, work: Any) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    def start(self, submit: Callable[[], str] = lambda: "handle") -> tuple[asyncio.Task[None], Reply]:
        reply = Reply(lambda _: None)
        return asyncio.ensure_future(self.requests.answer("id", reply, submit)), reply


def run(check: Callable[[Engine], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(check(Engine()), 10)

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_an_answer_from_beginning_to_end() -> None:
    async def check(engine: Engine) -> None:
        task, reply = engine.start()
        await until(lambda: reply.followed == "handle")
        idle = asyncio.ensure_future(engine.requests.idle())
        await asyncio.sleep(0.01)
        assert not idle.done()
        reply.end()
        await task
        await idle
        await engine.requests.abort("id")
        assert engine.aborted == []

    run(check)


def test_an_abort_waits_for_the_engines_word() -> None:
    async def check(engine: Engine) -> None:
        task, reply = engine.start()
        await until(lambda: reply.followed)
        task.cancel()
        abort = asyncio.ensure_future(engine.requests.abort("id"))
        await until(lambda: engine.aborted == ["handle"])
        await asyncio.sleep(0.01)
        assert not abort.done()
        reply.end()
        await abort

    run(check)


def test_the_end_of_a_request_forgets_no_later_one_of_its_id() -> None:
    async def check(engine: Engine) -> None:
        first, early = engine.start(lambda: "first")
        await until(lambda: early.followed)
        second, late = engine.start(lambda: "second")
        await until(lambda: late.followed)
        early.end()
        await first
        abort = asyncio.ensure_future(engine.requests.abort("id"))
        await until(lambda: engine.aborted == ["second"])
        late.end()
        await asyncio.gather(abort, second)

    run(check)


def test_a_request_whose_client_leaves_while_it_is_handed_over_is_aborted() -> None:
    release = threading.Event()

    def submit() -> str:
        assert release.wait(5)
        return "late"

    async def check(engine: Engine) -> None:
        task, reply = engine.start(submit)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        await until(lambda: engine.aborted == ["late"])
        assert reply.followed == "late"
        reply.end()
        await asyncio.gather(*engine.tasks)

    run(check)


def test_an_abort_waits_for_a_kv_cache_that_is_on_its_way_but_nobody_waits_for_the_abort() -> None:
    async def check(engine: Engine) -> None:
        engine.fetches = True
        task, reply = engine.start()
        await until(lambda: reply.followed)
        task.cancel()
        await engine.requests.abort("id")
        await asyncio.sleep(0.02)
        assert engine.aborted == []
        reply.begun.set()
        await until(lambda: engine.aborted == ["handle"])
        reply.end()
        await asyncio.gather(*engine.tasks)

    run(check)


def test_an_engine_that_takes_no_more_aborts_gets_none() -> None:
    async def check(engine: Engine) -> None:
        engine.takes_aborts = False
        task, reply = engine.start()
        await until(lambda: reply.followed)
        await engine.requests.abort("id")
        assert engine.aborted == []
        task.cancel()

    run(check)


def test_an_abort_that_nobody_acknowledges_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(in_flight, "_ABORT_SECONDS", 0.05)

    async def check(engine: Engine) -> None:
        task, reply = engine.start()
        await until(lambda: reply.followed)
        await engine.requests.abort("id")
        assert engine.aborted == ["handle"]
        await engine.requests.idle()
        task.cancel()

    run(check)
    assert "has not acknowledged an abort" in caplog.text


def test_errors_are_the_callers() -> None:
    async def check(engine: Engine) -> None:
        task, _ = engine.start(lambda: str(1 // 0))
        with pytest.raises(ZeroDivisionError):
            await task
        task, reply = engine.start()
        await until(lambda: reply.followed)
        reply.give_up(ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await task
        await engine.requests.idle()

    run(check)


def test_every_engine_has_its_own_way_to_follow() -> None:
    async def check(_: Engine) -> None:
        with pytest.raises(TypeError, match="follow"):
            TrackedAnswer(lambda _: None)  # type: ignore[abstract]

    run(check)
