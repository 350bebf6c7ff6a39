"""Hooks of several plugins are isolated from each other and cannot hang the host."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from dynamo_worker.containment import contained
from dynamo_worker.deadline import Deadline
from dynamo_worker.host.plugins.calling import CANCEL_GRACE, call_concurrently, call_in_order


async def hang():
    await asyncio.sleep(60)


async def swallow_cancellation():
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)


async def fail():
    raise ValueError("async")


def fail_at_once():
    raise ValueError("sync")


async def leave():
    raise SystemExit(3)


async def interrupt():
    raise KeyboardInterrupt


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


async def panic():
    raise PanicException("poisoned")


async def cancel_itself():
    raise asyncio.CancelledError


def run(calls, timeout=0.2, **options):
    return asyncio.run(call_concurrently("drain", calls, timeout, **options))


def test_every_plugin_has_its_outcome(caplog):
    started = time.monotonic()
    outcomes = run(
        {
            "sync": lambda: "value",
            "async": lambda: asyncio.sleep(0.01),
            "hangs": hang,
            "fails": fail,
            "fails at once": fail_at_once,
            "leaves": leave,
            "interrupts": interrupt,
            "panics": panic,
            "cancels": cancel_itself,
        }
    )
    assert time.monotonic() - started < 0.2 + CANCEL_GRACE + 0.1
    assert [(o.plugin, type(o.error).__name__) for o in outcomes] == [
        ("sync", "NoneType"),
        ("async", "NoneType"),
        ("hangs", "TimeoutError"),
        ("fails", "ValueError"),
        ("fails at once", "ValueError"),
        ("leaves", "SystemExit"),
        ("interrupts", "KeyboardInterrupt"),
        ("panics", "PanicException"),
        ("cancels", "CancelledError"),
    ]
    assert outcomes[0].ok
    assert outcomes[2].duration == pytest.approx(0.2, abs=0.1)
    fields = [record.fields for record in caplog.records]
    assert [field["plugin"] for field in fields] == [outcome.plugin for outcome in outcomes if outcome.error]


@pytest.mark.parametrize("escape", [leave, interrupt])
def test_what_would_end_the_loop_does_not_leave_its_task(escape):
    async def main():
        task = asyncio.ensure_future(contained(escape))
        await asyncio.wait({task})
        return task.exception()

    error = asyncio.run(main())
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, (SystemExit, KeyboardInterrupt))
    assert type(error.__cause__).__name__ in str(error)


def test_what_is_contained_is_awaited_otherwise():
    async def answer():
        return 42

    assert asyncio.run(contained(answer)) == 42
    with pytest.raises(ValueError, match="async"):
        asyncio.run(contained(fail))


def test_a_hook_that_ignores_its_cancellation_is_abandoned(caplog):
    async def main():
        started = time.monotonic()
        outcomes = await call_concurrently("drain", {"stubborn": swallow_cancellation}, 0.1)
        took = time.monotonic() - started
        await asyncio.sleep(1)  # it ends in its own time; nothing may complain then
        return outcomes, took

    outcomes, took = asyncio.run(main())
    assert took < 0.1 + CANCEL_GRACE + 0.1
    assert isinstance(outcomes[0].error, TimeoutError)
    assert "abandoned" in caplog.text


def test_stop_does_not_wait_for_the_others():
    started = time.monotonic()
    outcomes = run({"fails": fail, "hangs": hang}, timeout=30, stop=lambda outcome: outcome.error is not None)
    assert time.monotonic() - started < 1
    assert [outcome.plugin for outcome in outcomes] == ["fails"]


def test_cancelling_the_host_cancels_the_hooks():
    cancelled = []

    async def hook():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main():
        task = asyncio.create_task(call_concurrently("drain", {"a": hook}, 30))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert cancelled


def test_no_plugins():
    assert run({}) == []


def test_in_order_shares_what_is_left():
    seen = []

    async def main():
        async def hook(plugin, deadline):
            seen.append((plugin, deadline.remaining()))
            if plugin == "a":
                await hang()

        return await call_in_order("cleanup", hook, ["a", "b"], Deadline.after(0.6))

    outcomes = asyncio.run(main())
    assert [(o.plugin, o.ok) for o in outcomes] == [("a", False), ("b", True)]
    assert seen[0][1] == pytest.approx(0.3, abs=0.1)
    assert seen[1][1] == pytest.approx(0.3, abs=0.15)


def test_in_order_respects_the_limit():
    async def main():
        return await call_in_order("cleanup", lambda plugin, deadline: hang(), ["a"], Deadline.after(30), limit=0.1)

    started = time.monotonic()
    (outcome,) = asyncio.run(main())
    assert time.monotonic() - started < 1
    assert not outcome.ok


def test_in_order_after_the_deadline_still_calls_everybody():
    called = []
    asyncio.run(
        call_in_order("cleanup", lambda plugin, deadline: called.append(plugin), ["a", "b"], Deadline.after(-1))
    )
    assert called == ["a", "b"]
