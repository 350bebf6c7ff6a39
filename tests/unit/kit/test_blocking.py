"""Calls that block never block the event loop, nor the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from dynamo_worker.kit.blocking import Lane, OneAtATime, Poller, in_thread


def test_a_call_returns_or_raises_as_if_it_were_made_here() -> None:
    async def check() -> None:
        assert await in_thread(divmod, 7, 2, name="division") == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 7, 0, name="division")

    asyncio.run(check())


def test_a_call_has_a_limit() -> None:
    release = threading.Event()

    async def check() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await in_thread(release.wait, name="waits", limit=0.05)
        release.set()
        await asyncio.sleep(0.05)  # the late result disturbs nobody

    asyncio.run(check())


def test_a_call_that_never_returns_does_not_hold_the_process() -> None:
    code = (
        "import asyncio, threading\n"
        "from dynamo_worker.kit.blocking import in_thread\n"
        "async def main():\n"
        "    task = asyncio.ensure_future(in_thread(threading.Event().wait, name='for ever'))\n"
        "    await asyncio.sleep(0.05)\n"
        "    task.cancel()\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=False).returncode == 0


def test_who_asks_while_a_question_is_open_gets_its_answer() -> None:
    async def check() -> None:
        replies: list[asyncio.Future[int]] = []

        async def ask() -> int:
            replies.append(asyncio.get_running_loop().create_future())
            return await replies[-1]

        question = OneAtATime(ask)
        first, second = (asyncio.ensure_future(question.answer()) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        replies[0].set_result(1)
        assert await second == 1
        assert len(replies) == 1
        third = asyncio.ensure_future(question.answer())
        await asyncio.sleep(0.01)
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert len(replies) == 2
        OneAtATime(ask).cancel()

    asyncio.run(check())


def test_calls_in_a_lane_keep_their_order_and_see_the_loop() -> None:
    async def check() -> None:
        lane, seen = Lane("lane"), []

        def call(number: int, seconds: float) -> asyncio.AbstractEventLoop:
            time.sleep(seconds)
            seen.append(number)
            return asyncio.get_running_loop()

        first, second = lane.call(call, 1, 0.05), lane.call(call, 2, 0)
        assert await second is asyncio.get_running_loop()
        assert await first is asyncio.get_running_loop()
        assert seen == [1, 2]
        with pytest.raises(ValueError, match="invalid literal"):
            await lane.call(int, "x")

    asyncio.run(check())


def test_what_has_not_begun_in_a_lane_can_be_skipped() -> None:
    async def check() -> None:
        lane, release, called = Lane("lane"), threading.Event(), []
        first, second = lane.call(release.wait, 5), lane.call(called.append, 2)
        second.cancel()
        await asyncio.sleep(0.01)  # the thread learns of it a moment later
        release.set()
        assert await first
        await lane.call(called.append, 3)
        assert called == [3]

    asyncio.run(check())


def test_a_poller_hands_news_over_on_the_loop_and_survives_errors() -> None:
    async def check() -> None:
        sources: list[object] = [[1], [], OSError("the engine is gone"), [2]]
        taken: list[object] = []
        done = asyncio.Event()

        def read() -> list[int]:
            news = sources.pop(0) if sources else []
            if isinstance(news, Exception):
                raise news
            return news  # type: ignore[return-value]

        def take(news: list[int]) -> None:
            taken.extend((news, asyncio.get_running_loop()))
            if news == [2]:
                done.set()

        poller = Poller(read, take, "poller")
        await asyncio.wait_for(done.wait(), 10)
        loop = asyncio.get_running_loop()
        assert taken == [[1], loop, [2], loop]
        poller.stop()
        await asyncio.sleep(0.3)
        sources.append([3])
        await asyncio.sleep(0.3)
        assert sources == [[3]]

    asyncio.run(check())


def test_a_thread_may_outlast_its_function() -> None:
    """A process that it has started would otherwise end with it, if it has asked the kernel for that."""

    async def check() -> None:
        short = await in_thread(threading.current_thread, name="short")
        lasting = await in_thread(threading.current_thread, name="lasting", lasting=True)
        short.join(5)
        await asyncio.sleep(0.1)
        assert (short.is_alive(), lasting.is_alive()) == (False, True)

    asyncio.run(check())
