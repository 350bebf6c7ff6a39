"""What a person sees during a drain."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time

import pytest
from aio import until

from dynamo_worker.deadline import Deadline
from dynamo_worker.host import drain_progress
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.drain_progress import DrainProgress
from dynamo_worker.host.requests.serving import RequestRegistry


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(drain_progress, "_LIVE_INTERVAL", 0.01)
    return Terminal()


@pytest.fixture
def in_a_log(monkeypatch):
    monkeypatch.setattr(drain_progress, "_LOG_INTERVAL", 0.02)


def registry_with(count):
    registry = RequestRegistry()
    for number in range(count):
        registry.admit(str(number), graceful=True)
    return registry


def test_a_log_says_now_and_then_how_much_is_left(in_a_log, caplog):
    caplog.set_level("INFO")

    async def main():
        with DrainProgress(registry_with(3), Deadline.after(20), DrainMode.COMPLETE):
            await until(lambda: len(caplog.records) >= 2)

    asyncio.run(main())
    for record in caplog.records:
        assert record.getMessage() == "Still draining"
        assert record.fields["in_flight"] == 3
        assert 15 < record.fields["left_s"] <= 20


def test_nothing_is_said_when_nothing_is_in_flight(in_a_log, caplog):
    caplog.set_level("INFO")

    async def main():
        with DrainProgress(RequestRegistry(), Deadline.after(20), DrainMode.COMPLETE):
            await asyncio.sleep(0.1)

    asyncio.run(main())
    assert caplog.records == []


def test_nothing_is_said_after_the_drain(in_a_log, caplog):
    caplog.set_level("INFO")

    async def main():
        with DrainProgress(registry_with(1), Deadline.after(20), DrainMode.COMPLETE):
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)

    asyncio.run(main())
    assert caplog.records == []


@pytest.mark.parametrize(("count", "words"), [(1, "1 request left"), (12, "12 requests left")])
def test_a_terminal_shows_a_line_that_says_what_the_next_signal_does(terminal, count, words):
    async def main():
        with DrainProgress(registry_with(count), Deadline.after(20), DrainMode.COMPLETE):
            await until(lambda: words in terminal.getvalue())

    with contextlib.redirect_stderr(terminal):
        asyncio.run(main())
    shown = terminal.getvalue()
    assert "20 s until" in shown
    assert "Ctrl-C again to stop within 2 s" in shown


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (DrainMode.COMPLETE, "20 s until the rest is handed off."),
        (DrainMode.HANDOFF, "20 s until the rest is handed off."),
        (DrainMode.ABORT, "20 s until the rest is aborted."),
    ],
)
def test_a_terminal_says_what_becomes_of_the_rest(terminal, mode, words):
    async def main():
        with DrainProgress(registry_with(2), Deadline.after(20), mode):
            await until(lambda: words in terminal.getvalue())

    with contextlib.redirect_stderr(terminal):
        asyncio.run(main())


def test_a_terminal_is_left_as_it_was(terminal):
    async def main():
        started = time.monotonic()
        with DrainProgress(registry_with(1), Deadline.after(20), DrainMode.COMPLETE):
            await until(lambda: "Draining" in terminal.getvalue())
        shown = terminal.getvalue()
        await asyncio.sleep(0.05)
        assert terminal.getvalue() == shown, "still drawing"
        assert time.monotonic() - started < 5

    with contextlib.redirect_stderr(terminal):
        asyncio.run(main())
    shown = terminal.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is back"
    assert "Draining" not in shown[shown.rindex("\x1b[2K") :], "the line is erased"


def test_an_error_inside_the_drain_passes(terminal):
    async def main():
        with DrainProgress(registry_with(1), Deadline.after(20), DrainMode.COMPLETE):
            await asyncio.sleep(0.03)
            raise KeyError("bug")

    with contextlib.redirect_stderr(terminal), pytest.raises(KeyError):
        asyncio.run(main())
