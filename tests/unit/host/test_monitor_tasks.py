"""Monitors run until they are stopped, and none fails silently."""

from __future__ import annotations

import asyncio

from aio import settle, until

from dynamo_worker.host.monitors.monitor_tasks import MonitorTasks


async def forever():
    await asyncio.Event().wait()


async def fail():
    raise AttributeError("steps")


def test_a_monitor_that_fails_is_logged_and_the_others_go_on(caplog):
    async def main():
        monitors = MonitorTasks()
        other = monitors.start(forever())
        monitors.start(fail())
        await until(lambda: "Monitor failed" in caplog.text)
        assert not other.done()
        monitors.stop()
        await settle()
        assert other.done()

    asyncio.run(main())
    assert len(caplog.records) == 1
    assert isinstance(caplog.records[0].exc_info[1], AttributeError)


def test_one_that_is_stopped_is_no_failure(caplog):
    async def main():
        monitors = MonitorTasks()
        one, other = monitors.start(forever()), monitors.start(forever())
        await settle()
        monitors.stop_one(one)
        monitors.stop_one(one)
        await settle()
        assert one.done()
        assert not other.done()
        monitors.stop()
        await settle()
        assert other.done()

    asyncio.run(main())
    assert caplog.records == []
