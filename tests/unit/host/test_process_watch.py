"""The death of a watched process is reported at once, and once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from aio import settle, until

from dynamo_worker.errors import EngineDeadError, WorkerError
from dynamo_worker.host.monitors.process_watch import ProcessWatch


@contextlib.contextmanager
def child(program="import time; time.sleep(60)"):
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def watched(act, program="import time; time.sleep(60)", **options):
    """Watch a process, do something to it, and return what was reported and how many seconds later."""

    async def main():
        reported = []
        watch = ProcessWatch(reported.append)
        with child(program) as process:
            watch.watch([process.pid], "engine process", **options)
            await settle()
            assert reported == [], "it is alive"
            since = time.monotonic()
            act(process)
            await until(lambda: reported)
            took = time.monotonic() - since
        watch.close()
        (error,) = reported
        return process.pid, error, took

    return asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_process_is_reported_at_once(number):
    pid, error, took = watched(lambda process: process.send_signal(number))
    assert isinstance(error, EngineDeadError)
    assert f"engine process {pid}" in str(error)
    assert f"killed by {number.name}" in str(error)
    assert took < 1


def test_a_process_that_exits_is_reported_with_its_code():
    program = "import sys; sys.stdin.read(); sys.exit(7)"
    _, error, _ = watched(lambda process: None, program=program)
    assert "exit code 7" in str(error)


def test_a_signal_without_a_name_is_reported_too():
    """Most real-time signals have none in ``signal.Signals``."""
    _, error, _ = watched(lambda process: process.send_signal(signal.SIGRTMIN + 1))
    assert f"killed by signal {signal.SIGRTMIN + 1}" in str(error)


def test_the_owner_may_reap_first():
    def kill_and_reap(process):
        process.kill()
        process.wait()

    _, error, _ = watched(kill_and_reap)
    assert "died" in str(error)


def test_the_watch_leaves_the_reaping_to_the_owner():
    with child("import sys; sys.exit(3)") as process:

        async def main():
            reported = []
            watch = ProcessWatch(reported.append)
            watch.watch([process.pid], "engine process")
            await until(lambda: reported)

        asyncio.run(main())
        assert process.wait() == 3


def test_a_process_that_is_not_ours_is_watched_as_well():
    """An engine's ranks are grandchildren: their exit status is not ours to read, their death is seen all the same."""
    program = (
        "import subprocess, sys, time\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(rank.pid, flush=True)\n"
        "rank.wait(); time.sleep(60)\n"
    )

    async def main():
        reported = []
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as core:
            rank = int(core.stdout.readline())
            ProcessWatch(reported.append).watch([rank], "engine process")
            os.kill(rank, signal.SIGKILL)
            await until(lambda: reported)
            core.kill()
        (error,) = reported
        assert f"engine process {rank}" in str(error)

    asyncio.run(main())


def test_a_process_that_is_gone_already_is_reported():
    with child("pass") as process:
        process.wait()
    reported = []

    async def main():
        ProcessWatch(reported.append).watch([process.pid], "frontend", WorkerError)

    asyncio.run(main())
    (error,) = reported
    assert type(error) is WorkerError
    assert str(error) == f"frontend {process.pid} is dead"


def test_every_process_is_reported_once():
    async def main():
        reported = []
        watch = ProcessWatch(reported.append)
        with child() as first, child() as second:
            watch.watch([first.pid, second.pid], "engine process")
            first.kill()
            await until(lambda: reported)
            second.kill()
            await until(lambda: len(reported) == 2)
            await settle()
            assert len(reported) == 2
            assert f"{first.pid}" in str(reported[0])

    asyncio.run(main())


def test_after_close_nothing_is_reported_and_no_descriptor_is_left():
    async def main():
        reported = []
        before = len(os.listdir("/proc/self/fd"))
        watch = ProcessWatch(reported.append)
        with child() as process:
            watch.watch([process.pid], "engine process")
            watch.close()
            watch.close()
            assert len(os.listdir("/proc/self/fd")) == before
            process.kill()
            process.wait()
            await settle()
        assert reported == []

    asyncio.run(main())
