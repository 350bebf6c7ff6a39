from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dynamo_worker.supervisor import linux, process_tree
from dynamo_worker.supervisor.linux import Process

from .conftest import CHILDREN, state_of, wait_until


@pytest.fixture
def spawn():
    """Starts Python programs that print a line when they are ready; ends them afterwards."""
    processes = []

    def start(code: str, *arguments: str, **popen) -> Process:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, **popen)
        processes.append(process)
        process.stdout.readline()
        return Process(process.pid, linux.read_stat(process.pid).start)

    yield start
    for process in processes:
        for descendant in process_tree.descendants(process.pid):
            os.kill(descendant.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


READY = "import time; print(flush=True); time.sleep(1000)"


def test_names_with_spaces_and_parentheses(spawn):
    code = f"open('/proc/self/comm', 'w').write('a) R (b 1'); {READY}"
    process = spawn(code)
    wait_until(lambda: state_of(process.pid) == "S")
    stat = linux.read_stat(process.pid)
    assert (stat.name, stat.state, stat.parent) == ("a) R (b 1", "S", os.getpid())
    assert process_tree.describe(process).startswith(f"{process.pid} (a) R (b 1, state S")


def test_a_process_that_is_gone():
    child = subprocess.Popen(["true"])
    child.wait()
    process = Process(child.pid, 1)
    assert linux.read_stat(child.pid) is None
    assert not linux.is_alive(process)
    assert not linux.send_signal(process, signal.SIGKILL)
    assert not linux.catches(child.pid, signal.SIGTERM)
    assert process_tree.describe(process) == str(child.pid)
    assert not process_tree.is_resource_tracker(child.pid)


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_reused_pid_is_never_signalled(spawn, monkeypatch, pidfd):
    if not pidfd:

        def refuse(*_):
            raise PermissionError(1, "refused")

        monkeypatch.setattr(os, "pidfd_open", refuse)
    process = spawn(READY)
    earlier = Process(process.pid, process.start - 1)
    assert linux.is_alive(process)
    assert not linux.is_alive(earlier)
    assert not linux.send_signal(earlier, signal.SIGKILL)
    assert state_of(process.pid) in ("S", "R")
    assert linux.send_signal(process, signal.SIGKILL)
    wait_until(lambda: state_of(process.pid) == "Z")
    assert not linux.is_alive(process)


def test_catches(spawn):
    process = spawn(f"import signal; signal.signal(signal.SIGUSR1, print); {READY}")
    assert linux.catches(process.pid, signal.SIGUSR1)
    assert not linux.catches(process.pid, signal.SIGUSR2)


def test_descendants(spawn):
    process = spawn("import os; os.fork() or os.fork();" + READY)
    wait_until(lambda: len(process_tree.descendants(process.pid)) == 2)
    ours = process_tree.descendants(os.getpid())
    assert process in ours
    assert len(ours) >= 3
    assert (
        not {process, *process_tree.descendants(process.pid)} & process_tree.descendants(os.getpid(), {process}).keys()
    )


def test_marked(spawn, monkeypatch):
    monkeypatch.setenv("DWTEST", "/x/dw-1")  # ours is what we were started with: without it
    process = spawn(READY)
    other = spawn(READY, env={**os.environ, "DWTEST": "/x/dw-12"})
    found = process_tree.marked("DWTEST", "/x/dw-1")
    assert process in found
    assert other not in found


class TestResourceTracker:
    def test_a_real_one(self, spawn):
        process = spawn(f"from multiprocessing.resource_tracker import ensure_running; ensure_running(); {READY}")
        (tracker,) = process_tree.descendants(process.pid)
        wait_until(lambda: process_tree.is_resource_tracker(tracker.pid))  # from its exec on
        assert not process_tree.is_resource_tracker(process.pid)

    def test_what_only_looks_like_one(self, spawn):
        talks_of_it = spawn(f"x = 'from multiprocessing.resource_tracker import main'; {READY}")
        assert not process_tree.is_resource_tracker(talks_of_it.pid)
        fork_server = spawn(f"import os; 'from multiprocessing.forkserver import main'; {READY}")
        assert not process_tree.is_resource_tracker(fork_server.pid)

    def test_one_that_does_not_end_is_killed_in_the_end(self, spawn):
        """A tracker whose pipe is held open elsewhere would wait for ever."""
        tracker = spawn("from multiprocessing.resource_tracker import main\n" + READY)
        os.kill(tracker.pid, signal.SIGSTOP)
        assert process_tree.is_resource_tracker(tracker.pid)
        killing = killing_of(tracker)
        started = time.monotonic()
        assert killing.run(lambda: started + 10) == []
        assert process_tree.TRACKER_LIMIT <= time.monotonic() - started < 5


def killing_of(*processes: Process) -> process_tree.Killing:
    """Return the killing of our own children, which somebody else reaps."""

    def find():
        stats = {process: linux.read_stat(process.pid) for process in processes}
        return {process: stat for process, stat in stats.items() if stat is not None and stat.state != "Z"}

    return process_tree.Killing(find, lambda: False, lambda seconds, _: time.sleep(min(seconds, 0.01)))


def test_killing(spawn):
    processes = [spawn(READY) for _ in range(3)]
    os.kill(processes[0].pid, signal.SIGSTOP)
    killing = killing_of(*processes)
    started = time.monotonic()
    assert killing.run(lambda: started + 10) == []
    assert set(killing.seen) == set(processes)


def test_killing_gives_up_at_the_deadline_and_says_who_is_left(spawn, monkeypatch):
    process = spawn(READY)
    monkeypatch.setattr(linux, "send_signal", lambda *_: True)  # a process in state D does not die either
    started = time.monotonic()
    assert killing_of(process).run(lambda: started + 0.3) == [process]
    assert time.monotonic() - started < 3


def test_the_misbehaving_programs_are_where_the_tests_look():
    assert {path.stem for path in CHILDREN.glob("*.py")} >= {"stubborn", "forker", "rabbit", "shm_leaker", "worker"}
