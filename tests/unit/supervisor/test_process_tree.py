from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dynamo_worker.supervisor import ledger, linux, mark, process_tree
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.protocol import RUN_DIR

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


class TestLeftOf:
    """How the processes of a tree are found whose owners are dead."""

    def test_by_the_environment(self, spawn, monkeypatch):
        monkeypatch.setenv(RUN_DIR, "/x/dw-1")  # ours is what we were started with: without it
        process = spawn(READY)
        other = spawn(READY, env={**os.environ, RUN_DIR: "/x/dw-12"})
        found = process_tree.left_of("/x/dw-1", 0, [])
        assert process in found
        assert other not in found

    def test_by_a_path_that_is_not_text(self, spawn):
        path = os.fsdecode(b"/x\xff/dw-1")
        process = spawn(READY, env={**os.environ, RUN_DIR: path})
        assert process in process_tree.left_of(path, 0, [])

    def test_by_the_mark(self, spawn):
        """It passes on to what is forked and started anew, whatever that does to its environment and session."""
        of_tree = mark.draw()
        code = READY.replace("print(flush=True)", "import subprocess; p = subprocess.Popen(['sleep', '1000'], env={},"
                             " start_new_session=True); print(p.pid, flush=True)")  # fmt: skip
        process = spawn(code, preexec_fn=lambda: mark.put_on_ourselves(of_tree))
        other = spawn(READY, preexec_fn=lambda: mark.put_on_ourselves(mark.draw()))
        found = process_tree.left_of("/x/dw-1", of_tree, [])
        try:
            assert process in found
            assert len(found) == 2
            assert other not in found
            assert process_tree.left_of("/x/dw-1", 0, []) == {}  # a mark of 0 is none
        finally:
            for left in found:
                linux.send_signal(left, signal.SIGKILL)

    def test_by_the_record_and_by_descent(self, spawn):
        code = "import subprocess; p = subprocess.Popen(['sleep', '1000'], env={}); print(flush=True); p.wait()"
        process = spawn(code)
        found = process_tree.left_of("/x/dw-1", 0, [process])
        assert next(iter(found)) == process
        assert len(found) == 2

    def test_a_reused_pid_is_another_process(self, spawn):
        process = spawn(READY)
        assert process_tree.left_of("/x/dw-1", 0, [Process(process.pid, process.start - 1)]) == {}

    def test_the_dead_do_not_count(self, spawn):
        of_tree = mark.draw()
        process = spawn("print(flush=True)", preexec_fn=lambda: mark.put_on_ourselves(of_tree))
        wait_until(lambda: state_of(process.pid) == "Z")
        assert process_tree.left_of("/x/dw-1", of_tree, [process]) == {}

    def test_never_ourselves(self, spawn):
        ours = [Process(pid, linux.read_stat(pid).start) for pid in (os.getpid(), os.getppid())]
        assert process_tree.left_of("/x/dw-1", 0, ours).keys().isdisjoint(ours)

    def test_never_those_of_the_supervisor_that_asks(self, spawn):
        """Somebody has started it from within the tree that is dead now."""
        of_tree = mark.draw()
        process = spawn(READY, preexec_fn=lambda: mark.put_on_ourselves(of_tree))
        assert process in process_tree.left_of("/x/dw-1", of_tree, [])
        assert process not in process_tree.left_of("/x/dw-1", of_tree, [], supervisor=os.getpid())


class TestRecord:
    def test_changes_are_recorded(self, tmp_path):
        tree = {Process(5, 6)}
        record = process_tree.TreeRecord(str(tmp_path), lambda: tree)
        assert record.due > time.monotonic()  # the tree has to grow first
        record.update()
        assert ledger.read_processes(tmp_path) == [(5, 6)]
        tree.add(Process(7, 8))
        record.update()
        assert sorted(ledger.read_processes(tmp_path)) == [(5, 6), (7, 8)]

    def test_a_tree_that_does_not_change_is_looked_at_less_and_less(self, tmp_path):
        record = process_tree.TreeRecord(str(tmp_path), lambda: [Process(5, 6)])
        pauses = []
        for _ in range(7):
            record.update()
            pauses.append(record.due - time.monotonic())
        assert pauses[0] < pauses[2] < pauses[4]
        assert pauses[-1] > 15

    def test_a_slow_look_is_rare(self, tmp_path):
        def tree() -> list[Process]:
            time.sleep(0.1)
            return []

        record = process_tree.TreeRecord(str(tmp_path), tree)
        record.update()
        assert record.due >= time.monotonic() + 45

    def test_no_descriptor_left_is_no_end(self, tmp_path):
        def tree() -> list[Process]:
            raise OSError(24, "Too many open files")

        record = process_tree.TreeRecord(str(tmp_path), tree)
        record.update()
        assert record.due > time.monotonic()

    def test_a_full_disk_is_no_end(self, tmp_path):
        record = process_tree.TreeRecord(str(tmp_path / "missing"), lambda: [Process(5, 6)])
        record.update()
        (tmp_path / "missing").mkdir()
        record.update()  # and it is tried again
        assert ledger.read_processes(tmp_path / "missing") == [(5, 6)]


class TestResourceTracker:
    def test_a_real_one(self, spawn):
        process = spawn(f"from multiprocessing.resource_tracker import ensure_running; ensure_running(); {READY}")
        (tracker,) = process_tree.descendants(process.pid)
        wait_until(lambda: process_tree.is_resource_tracker(tracker.pid))  # from its exec on
        assert not process_tree.is_resource_tracker(process.pid)

    def test_one_of_python_310(self, spawn):
        """There we put code of ours in front of that of ``multiprocessing``."""
        process = spawn(
            "from dynamo_worker.supervisor import interpreter; interpreter.has_safe_path = lambda: False; "
            "interpreter.protect_multiprocessing(); "
            f"from multiprocessing.resource_tracker import ensure_running; ensure_running(); {READY}"
        )
        (tracker,) = process_tree.descendants(process.pid)
        wait_until(lambda: process_tree.is_resource_tracker(tracker.pid))

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


def test_killing_does_not_wait_for_nor_count_who_has_ended(spawn):
    """Its parent does not reap it, and is none of those that are killed."""
    parent = spawn("import os, time; os.fork() or os._exit(0); print(flush=True); time.sleep(1000)")
    (zombie,) = process_tree.descendants(parent.pid)
    wait_until(lambda: state_of(zombie.pid) == "Z")
    killing = process_tree.Killing(
        lambda: process_tree.descendants(parent.pid), lambda: False, lambda seconds, _: time.sleep(seconds)
    )
    deadline = time.monotonic() + 5
    assert killing.run(lambda: deadline) == []
    assert killing.seen == {}


def test_one_whose_first_thread_has_ended_is_alive(spawn):
    """It looks like a zombie, but others of its threads may hang in a driver."""
    code = """if True:
        import ctypes, threading, time
        threading.Thread(target=time.sleep, args=(1000,)).start()
        print(flush=True)
        ctypes.CDLL(None).pthread_exit(None)
    """
    process = spawn(code)
    wait_until(lambda: state_of(process.pid) == "Z")
    assert linux.is_alive(process)
    killing = process_tree.Killing(
        lambda: {process: stat} if (stat := linux.read_stat(process.pid)) else {},
        lambda: False,
        lambda seconds, _: time.sleep(seconds),
    )
    deadline = time.monotonic() + 5
    assert killing.run(lambda: deadline) == []
    assert list(killing.seen) == [process]
    assert not linux.is_alive(process)


def test_killing_gives_up_at_the_deadline_and_says_who_is_left(spawn, monkeypatch):
    process = spawn(READY)
    monkeypatch.setattr(linux, "send_signal", lambda *_: True)  # a process in state D does not die either
    started = time.monotonic()
    assert killing_of(process).run(lambda: started + 0.3) == [process]
    assert time.monotonic() - started < 3


def test_the_misbehaving_programs_are_where_the_tests_look():
    assert {path.stem for path in CHILDREN.glob("*.py")} >= {"stubborn", "forker", "rabbit", "shm_leaker", "worker"}
