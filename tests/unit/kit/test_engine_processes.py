"""An engine's processes: found by their names, and ended in order and in time."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_worker import Deadline
from dynamo_worker.kit import engine_processes
from dynamo_worker.kit.engine_processes import (
    EngineProcesses,
    Launched,
    StartedSince,
    dead,
    kill,
    named,
    while_alive,
)
from dynamo_worker.supervisor import process_tree
from dynamo_worker.testing import eventually

TITLE = b"TOY::"
#: A leader that starts one process below it; how each takes SIGTERM is in its arguments.
LEADER = """
import os, signal, subprocess, sys, time
executable, leader, below = sys.argv[1:]
child = subprocess.Popen(["TOY::Below", "-c", below], executable=executable)
exec(leader)
open("/proc/self/comm", "w").write("listening")
child.wait()
time.sleep(60)
"""
SLEEPS = "import time; time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[bytes]], leader: str = "", below: str = SLEEPS) -> tuple[int, int]:
    arguments = ["TOY::Leader", "-c", LEADER, sys.executable, leader, below]
    process = subprocess.Popen(arguments, executable=sys.executable)
    started.append(process)
    listening = Path(f"/proc/{process.pid}/comm")
    eventually(lambda: len(named(TITLE)) == 2 and listening.read_text() == "listening\n", 10, "both processes")
    below_pid = next(pid for pid in named(TITLE) if pid != process.pid)
    return process.pid, below_pid


def state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def ended(*pids: int) -> bool:
    return all(state(pid) in ("gone", "Z") for pid in pids)


@pytest.mark.parametrize("below", [SLEEPS, DEAF], ids=["hears", "deaf"])
def test_what_does_not_end_by_itself_is_killed(started: list[subprocess.Popen[bytes]], below: str) -> None:
    pids = start(started, below=below)
    processes = EngineProcesses(TITLE)
    since = time.monotonic()
    asyncio.run(processes.end(0.1, Deadline.after(50)))
    assert time.monotonic() - since < 20, "long before the deadline, and before they would end by themselves"
    eventually(lambda: ended(*pids), 10, "what was killed to end")
    assert started[0].wait(10) == -signal.SIGKILL


def test_stopped_processes_end_too(started: list[subprocess.Popen[bytes]]) -> None:
    pids = start(started)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    asyncio.run(EngineProcesses(TITLE).end(0.1, Deadline.after(50)))
    eventually(lambda: ended(*pids), 10, "what was killed to end")


def test_leaders_that_listen_end_what_is_below_them(started: list[subprocess.Popen[bytes]]) -> None:
    leader = "signal.signal(signal.SIGTERM, lambda *_: (child.kill(), os._exit(7)))"
    pids = start(started, leader)
    processes = EngineProcesses(TITLE)
    processes.signal_leaders()
    asyncio.run(processes.end(5.0, Deadline.after(5)))
    assert ended(*pids)
    assert started[0].wait() == 7, "nobody killed it"


def test_others_are_left_alone(started: list[subprocess.Popen[bytes]]) -> None:
    start(started)
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPS])
    started.append(stranger)
    asyncio.run(EngineProcesses(TITLE).end(0.1, Deadline.after(5)))
    assert stranger.poll() is None


def test_nothing_to_end() -> None:
    assert named(b"NOBODY::") == []
    asyncio.run(EngineProcesses(b"NOBODY::").end(1.0, Deadline.after(5)))


def name_of_this_process(name: str) -> str:
    """Return code that gives a process its name in the process table, as ``orted`` has one."""
    return f"open('/proc/self/comm', 'w').write({name!r}); "


def test_what_a_launcher_has_started_is_found_by_its_parents(started: list[subprocess.Popen[bytes]]) -> None:
    below = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); " + SLEEPS
    launcher = (
        name_of_this_process("toylauncher")
        + f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {below!r}]); "
        + SLEEPS
    )
    process = subprocess.Popen([sys.executable, "-c", launcher])
    other = subprocess.Popen([sys.executable, "-c", SLEEPS])
    started += [process, other]
    eventually(lambda: len(Launched.by("toylauncher").helpers) == 1, 10, "the tree")
    found = Launched.by("toylauncher")
    assert [each.pid for each in found.launchers] == [process.pid]
    assert len(found.children) == 1
    pids = [each.pid for each in found.children + found.helpers]
    asyncio.run(kill(found.children + found.helpers, Deadline.after(5)))
    assert ended(*pids)
    assert dead(found.launchers + found.children + found.helpers) == pids
    assert not ended(process.pid)
    assert not ended(other.pid)
    assert Launched.by("nobody") == ([], [], [])


def test_work_that_waits_for_a_dead_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_processes, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(engine_processes, "_REPORT_SECONDS", 0.05)
    child = subprocess.Popen([sys.executable, "-c", SLEEPS])
    process = next(one for one in process_tree.descendants(os.getpid()) if one.pid == child.pid)

    async def check() -> None:
        assert await while_alive(asyncio.sleep(0.05, "done"), lambda: [process]) == "done"
        with pytest.raises(ZeroDivisionError):
            await while_alive(asyncio.to_thread(divmod, 1, 0), lambda: [process])
        hanging = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(while_alive(hanging, lambda: [process]))
        await asyncio.sleep(0.05)
        child.kill()
        with pytest.raises(ChildProcessError, match=f"a process of the engine has died .pid {child.pid}."):
            await asyncio.wait_for(waiting, 10)
        hanging.cancel()

    asyncio.run(check())
    child.wait()


def test_work_may_say_itself_why_a_process_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_processes, "_WATCH_SECONDS", 0.01)
    child = subprocess.Popen([sys.executable, "-c", SLEEPS])
    process = next(one for one in process_tree.descendants(os.getpid()) if one.pid == child.pid)

    async def work() -> None:
        await asyncio.sleep(0.05)
        child.kill()
        await asyncio.sleep(0.2)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(while_alive(work(), lambda: [process]))
    child.wait()


class TestStartedSince:
    """The processes of an engine that does not tell which are its own."""

    def run(self, started: list[subprocess.Popen[bytes]], *command: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command))
        return started[-1]

    def test_only_what_came_later_and_stays(self, started: list[subprocess.Popen[bytes]]) -> None:
        self.run(started, "sleep", "60")
        since = StartedSince()
        assert asyncio.run(since.lasting()) == []
        lasting, brief = self.run(started, "sleep", "61"), self.run(started, "sleep", "0.2")
        assert {process.pid for process in since.found()} == {lasting.pid, brief.pid}
        assert [process.pid for process in asyncio.run(since.lasting())] == [lasting.pid]

    def test_helpers_do_not_count(self, started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
        since = StartedSince()
        compiler = tmp_path / "ninja"
        compiler.symlink_to("/bin/sleep")
        self.run(started, str(compiler), "60")
        self.run(started, sys.executable, "-c", SLEEPS, "torch/_inductor/compile_worker")
        core = self.run(started, sys.executable, "-c", SLEEPS, "core")
        eventually(lambda: [one.pid for one in since.found()] == [core.pid], 5, "the names of all three")

    def test_those_that_the_operator_names(self, started: list[subprocess.Popen[bytes]]) -> None:
        since = StartedSince()
        self.run(started, "sleep", "61")
        other = self.run(started, "sleep", "62")
        assert [process.pid for process in asyncio.run(since.lasting(re.compile(r"sleep 62")))] == [other.pid]
