"""Scrapes: the event loop goes on, and slow or failing metrics have a bound."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from dynamo_worker.host.status.http_message import HttpError
from dynamo_worker.host.status.scrape import Scrape


def test_the_loop_goes_on_while_metrics_are_rendered() -> None:
    release, threads = threading.Event(), []

    def render() -> str:
        threads.append(threading.current_thread())
        release.wait(20)
        return "a 1\n"

    async def main() -> None:
        scrape = Scrape(render)
        both = asyncio.gather(scrape.refresh(), scrape.refresh())
        await asyncio.sleep(0.05)  # would not return if the loop rendered
        release.set()
        await both
        assert scrape.text() == "a 1\n"
        scrape.close()

    asyncio.run(main())
    assert threads != [threading.main_thread()]
    assert len(threads) == 1, "overlapping scrapes share one rendering, and the runtime gets its text"


def test_a_rendering_that_hangs_is_given_up_and_not_repeated() -> None:
    release, calls = threading.Event(), []

    def render() -> str:
        calls.append(time.monotonic())
        release.wait(20)
        return ""

    async def main() -> None:
        scrape = Scrape(render, patience=0.1)
        for _ in range(3):
            with pytest.raises(HttpError, match="could not be rendered within") as raised:
                await scrape.refresh()
            assert raised.value.status.startswith("504")
        release.set()
        scrape.close()

    asyncio.run(main())
    assert len(calls) == 1


def test_an_error_is_answered_and_the_next_scrape_tries_again() -> None:
    results = iter([ValueError("two types for a metric"), "b 2\n"])

    def render() -> str:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    async def main() -> None:
        scrape = Scrape(render)
        with pytest.raises(HttpError, match="cannot be rendered: two types for a metric"):
            await scrape.refresh()
        await scrape.refresh()
        assert scrape.text() == "b 2\n"
        scrape.close()

    asyncio.run(main())


def test_a_scrape_that_begins_as_another_ends() -> None:
    async def main() -> None:
        scrape = Scrape(lambda: "d 1\n")

        async def twice() -> None:
            await scrape.refresh()
            await scrape.refresh()

        await asyncio.gather(twice(), scrape.refresh())
        scrape.close()

    asyncio.run(main())


def test_who_asks_the_runtime_directly_gets_current_metrics() -> None:
    numbers = iter(range(10))
    scrape = Scrape(lambda: f"c {next(numbers)}\n")
    assert scrape.text() == "c 0\n"
    assert scrape.text() == "c 1\n"


def test_a_text_that_nobody_asked_for_in_time_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(10))

    async def main() -> None:
        scrape = Scrape(lambda: f"c {next(numbers)}\n")
        await scrape.refresh()
        assert scrape.text() == "c 0\n", "just rendered"
        await scrape.refresh()
        monkeypatch.setattr("dynamo_worker.host.status.scrape._FRESH", -1.0)
        assert scrape.text() == "c 2\n"
        scrape.close()

    asyncio.run(main())
