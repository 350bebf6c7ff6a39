"""Whatever dies first, the other side takes the tree down and cleans up."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_worker.supervisor.protocol import SIGNAL_DEBOUNCE
from dynamo_worker.supervisor.run_directory import RunDirectory
from dynamo_worker.testing.limits import pids_cgroup

from .conftest import state_of, wait_until

SERVING = "state=SERVING"
TREE = (
    "child=stubborn.py",
    "child=forker.py",
    "child=stopped.py",
    "child=shm_tracked.py",
    "child=shm_leaker.py",
    "temp",
)
SETTINGS = 'settings={"termination_grace_period":3}'
INSTANCE = "4ec5c2a6e8130c29"


@pytest.fixture
def hurt(supervised):
    """A worker with every kind of descendant, registered with file discovery; returns the discovery directory."""
    root = supervised.base / "discovery"
    supervised.environment["DYN_FILE_KV"] = str(root)
    supervised.start(f"register-file={root}:{INSTANCE}", *TREE, SERVING, "arrived", "hang")
    assert len(supervised.tree()) > 10
    assert len(supervised.segments()) == 9
    wait_until(lambda: set(supervised.segments()) <= supervised.recorded(), what="all segments recorded")
    other = root / "v1/instances/ns%2Fbackend%2Fgenerate%2F1111222233334444"
    other.write_text("{}")
    yield root
    assert [path for path in root.rglob("*") if path.is_file()] == [other]


def registered(root: Path) -> bool:
    return any(INSTANCE in path.name for path in root.rglob("*"))


class TestTheWorkerIsKilled:
    def test_everything_goes(self, supervised, hurt, measured):
        started = time.monotonic()
        os.kill(supervised.worker, signal.SIGKILL)
        measured("kill -9 of the worker: registration withdrawn", wait_until(lambda: not registered(hurt)), 0.5)
        assert supervised.wait() == 137
        measured("kill -9 of the worker: exit", time.monotonic() - started, 0.5)
        supervised.gone(0.5)

    def test_a_tree_of_nothing_is_quick(self, supervised, measured):
        supervised.start(SERVING, "arrived", "hang")
        worker = supervised.worker
        started = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        assert supervised.wait() == 137
        measured("kill -9 of a lone worker: exit", time.monotonic() - started, 0.5)

    def test_descendants_that_run_away_by_forking(self, supervised):
        supervised.start("child=rabbit.py", SERVING, "arrived", "hang")
        started = time.monotonic()
        os.kill(supervised.worker, signal.SIGKILL)
        assert supervised.wait() == 137
        assert time.monotonic() - started < 10

    def test_shared_memory_made_right_before(self, supervised):
        """Nobody had time to see whose it is, and the dead use nothing."""
        supervised.start(SERVING, "segment", "arrived", "sleep=0.05", "segment", "sleep=0.01", "segment", "die=9")
        assert supervised.wait() == 137
        assert len(supervised.shm_names.read_text().split()) == 3
        assert supervised.segments() == []

    def test_worker_that_is_stopped(self, supervised):
        supervised.start(SERVING, "arrived", "hang")
        os.kill(supervised.worker, signal.SIGSTOP)
        supervised.signal(signal.SIGTERM)
        supervised_text = wait_until(lambda: "level=1" in supervised.text)
        assert supervised_text is not None
        time.sleep(0.11)
        supervised.signal(signal.SIGINT)
        assert supervised.wait() == 130


class TestTheSupervisorIsKilled:
    def test_everything_goes(self, supervised, hurt, measured):
        started = time.monotonic()
        supervised.signal(signal.SIGKILL)
        supervised.gone()
        measured("kill -9 of the supervisor: all gone", time.monotonic() - started, 1.0)
        assert not registered(hurt)
        assert "stopped by the guardian" in supervised.text
        supervised.wait()

    def test_with_its_whole_group(self, supervised, hurt):
        """As ``kill -9 -PGID`` does, and the OOM killer may."""
        group = os.getpgid(supervised.pid)
        assert group != os.getpgid(supervised.guardian)
        supervised.signal(signal.SIGKILL)
        supervised.gone()

    def test_with_a_stopped_guardian(self, supervised, hurt, measured):
        """The kernel wakes the guardian when its parent dies."""
        os.kill(supervised.guardian, signal.SIGSTOP)
        started = time.monotonic()
        supervised.signal(signal.SIGKILL)
        supervised.gone()
        measured("kill -9 of the supervisor, guardian stopped: all gone", time.monotonic() - started, 1.0)

    def test_during_the_cleaning(self, supervised, hurt):
        os.kill(supervised.worker, signal.SIGKILL)
        supervised.signal(signal.SIGKILL)
        supervised.gone()


@pytest.fixture
def guardian_hangs_while_cleaning(supervised, tmp_path):
    """The first one that cleans up does nothing but wait; returns a file that exists from then on."""
    begun = tmp_path / "begun"
    supervised.patch(f"""
        import dynamo_worker.supervisor.cleanup as m, os, time
        run = m.Cleanup.run
        def hang(self):
            if not os.path.exists({str(begun)!r}):
                open({str(begun)!r}, "w").close()
                time.sleep(1000)
            return run(self)
        m.Cleanup.run = hang
    """)
    return begun


class TestTheGuardianIsKilled:
    def test_everything_goes(self, supervised, hurt, measured):
        started = time.monotonic()
        os.kill(supervised.guardian, signal.SIGKILL)
        assert supervised.wait() == 1
        measured("kill -9 of the guardian: exit", time.monotonic() - started, 1.0)
        assert 'reason="the guardian process was killed, and the worker with it"' in supervised.text
        assert not registered(hurt)
        supervised.gone(0.5)

    def test_before_it_has_told_of_the_workers_end(self, supervised, hurt):
        """Whoever killed the guardian may have killed the worker by that."""
        guardian, worker = supervised.guardian, supervised.worker
        os.kill(guardian, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        os.kill(guardian, signal.SIGKILL)
        assert supervised.wait() == 1
        assert 'reason="the guardian process was killed, and the worker with it"' in supervised.text

    def test_during_the_cleaning(self, supervised, guardian_hangs_while_cleaning, hurt):
        """It has told how the worker ended, and that counts."""
        os.kill(supervised.worker, signal.SIGKILL)
        wait_until(guardian_hangs_while_cleaning.exists)
        os.kill(supervised.guardian, signal.SIGKILL)
        assert supervised.wait() == 137
        assert "Guardian died" in supervised.text
        assert 'reason="worker killed by SIGKILL' in supervised.text

    def test_stopped_when_the_worker_ends(self, supervised, hurt):
        os.kill(supervised.guardian, signal.SIGSTOP)
        os.kill(supervised.worker, signal.SIGKILL)
        assert supervised.wait() == 137
        assert "Guardian is not responding" in supervised.text

    def test_hangs_while_cleaning(self, supervised, tmp_path):
        """Reading the memory map of a process that is stuck in a driver can block for ever. The supervisor does not."""
        (tmp_path / "sitecustomize.py").write_text(
            "import dynamo_worker.supervisor.shared_memory as m, time\nm.segments_of = lambda pid: time.sleep(1000)\n"
        )
        supervised.environment["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
        supervised.start(SETTINGS, "child=stubborn.py", SERVING, "arrived", "hang")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 6
        assert "Guardian is not responding" in supervised.text
        assert time.monotonic() - started < 5 * 3

    def test_stopped_before_it_has_started_the_worker(self, supervised, measured):
        """Nobody tells of a worker, not even after the kill."""
        supervised.patch("""
            import os, signal
            setsid = os.setsid
            def stop():
                setsid()
                os.kill(os.getpid(), signal.SIGSTOP)
            os.setsid = stop
        """)
        supervised.start("hang")
        wait_until(lambda: [pid for pid in supervised.children_of(supervised.pid) if state_of(pid) == "T"])
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        measured("SIGTERM with a guardian that was stopped at its start", time.monotonic() - started, 4.0)
        assert "Guardian is not responding" in supervised.text
        assert 'reason="stopped during start"' in supervised.text

    def test_signals_for_everybody_do_not_reach_it(self, supervised):
        supervised.start(SERVING, "arrived", "obey=0")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
            os.kill(supervised.guardian, number)
        time.sleep(0.2)
        assert supervised.process.poll() is None
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_children_from_before_exec_are_left_alone(self, supervised):
        """`sh -c 'helper & exec dynamo-worker'` makes the helper our child, but not part of the worker."""
        helper = supervised.base / "helper"
        wrapper = f'env -u DWTEST_MARK sleep 100 & echo $! > {helper}; exec "$0" "$@"'
        supervised.start(SERVING, "arrived", "hang", shell_wrapper=wrapper)
        pid = int(helper.read_text())
        try:
            os.kill(supervised.guardian, signal.SIGKILL)
            assert supervised.wait() == 1
            assert state_of(pid) == "S"
        finally:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def freeze():
    """Freezes a process so that SIGKILL does not end it, as one that hangs in a driver; returns how to thaw it."""
    group = Path("/sys/fs/cgroup/freezer") / f"dwtest-{os.urandom(4).hex()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no cgroup to freeze processes in")

    def thaw():
        (group / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (group / "tasks").read_text())

    def freeze_one(pid):
        for task in os.listdir(f"/proc/{pid}/task"):
            (group / "tasks").write_text(task)
        (group / "freezer.state").write_text("FROZEN")
        wait_until(lambda: "FROZEN" in (group / "freezer.state").read_text())
        return thaw

    yield freeze_one
    thaw()
    group.rmdir()


class TestTheWorkerSurvivesTheKill:
    """Everybody else goes; what belongs to it is left for the next start."""

    def assert_left(self, supervised, thaw):
        assert "Processes survived SIGKILL" in supervised.text
        (directory,) = supervised.run_directories
        thaw()
        supervised.start("exit-message=2:usage", "exit=2")
        wait_until(lambda: not directory.exists(), what="swept")

    @pytest.mark.parametrize(("signals", "code", "bar"), [(1, 6, 5.0), (2, 143, 4.5), (3, 143, 4.0)])
    def test_a_stop(self, supervised, freeze, measured, signals, code, bar):
        supervised.start('settings={"termination_grace_period":5}', "child=stubborn.py", SERVING, "arrived", "hang")
        worker = supervised.worker
        thaw = freeze(worker)
        started = time.monotonic()
        for _ in range(signals):
            supervised.signal(signal.SIGTERM)
            time.sleep(2 * SIGNAL_DEBOUNCE)
        assert supervised.wait() == code
        measured(f"{signals} SIGTERM and a worker that survives SIGKILL: exit", time.monotonic() - started, bar)
        assert "Worker survived SIGKILL; supervisor takes over" in supervised.text
        assert "Guardian is not responding" not in supervised.text
        assert supervised.tree() == {worker}
        self.assert_left(supervised, thaw)

    def test_the_supervisor_is_killed(self, supervised, freeze):
        supervised.patch("""
            from dynamo_worker.supervisor import cleanup, guardian
            cleanup.LIMIT = guardian.DEATH_LIMIT = 0.5
        """)
        supervised.start("child=stubborn.py", SERVING, "arrived", "hang")
        guardian, worker = supervised.guardian, supervised.worker
        thaw = freeze(worker)
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        wait_until(lambda: state_of(guardian) is None, what="the guardian's end")
        assert supervised.tree() == {worker}
        self.assert_left(supervised, thaw)


def test_after_the_third_signal_the_guardian_waits_for_what_dies_late(supervised, freeze, measured):
    """The kernel needs a moment for a process with much memory. Nothing may be left for a next start to sweep."""
    supervised.start("child=stubborn.py", SERVING, "arrived", "hang")
    (directory,) = supervised.run_directories
    (child,) = supervised.children_of(supervised.worker)
    thaw = freeze(child)
    for _ in range(3):
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        time.sleep(2 * SIGNAL_DEBOUNCE)
    assert supervised.wait() == 143
    measured("third signal to exit, a process dies late", time.monotonic() - started, 0.7)
    time.sleep(0.5)
    thaw()
    wait_until(lambda: not directory.exists(), what="removed by the guardian")
    supervised.gone()


class TestBothAreKilled:
    def kill_both(self, supervised) -> None:
        guardian = supervised.guardian
        os.kill(supervised.pid, signal.SIGSTOP)
        os.kill(guardian, signal.SIGSTOP)
        os.kill(guardian, signal.SIGKILL)
        os.kill(supervised.pid, signal.SIGKILL)
        supervised.wait()

    def test_the_worker_dies_and_the_next_start_cleans_the_rest(self, supervised, hurt):
        worker = supervised.worker
        self.kill_both(supervised)
        wait_until(lambda: state_of(worker) is None)
        (stale,) = supervised.run_directories
        assert registered(hurt)
        supervised.start(SERVING, "arrived", "obey=0")
        wait_until(lambda: not stale.exists(), what="sweep")
        wait_until(lambda: not supervised.segments(), what="segments removed by the sweep")
        assert not registered(hurt)
        wait_until(lambda: "Cleaned up after an earlier worker" in supervised.text)
        assert len(supervised.run_directories) == 1
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    @pytest.mark.parametrize("known_by", ["its mark", "the record"])
    def test_processes_that_named_themselves(self, supervised, known_by):
        """setproctitle overwrites the environment that /proc shows; vLLM's and SGLang's processes use it."""
        pids = supervised.base / "titled"
        supervised.environment["TITLED_PIDS"] = str(pids)
        if known_by == "the record":
            supervised.environment["TITLED_UNMARKED"] = "1"
        supervised.start("child=titled.py", "child=titled.py", SERVING, "arrived", "hang")

        def alive() -> set[int]:
            return {int(pid) for pid in pids.read_text().split() if state_of(int(pid)) not in (None, "Z")}

        titled = alive()
        try:
            if known_by == "the record":
                wait_until(lambda: titled <= supervised.recorded_processes(), what="the tree recorded")
            worker = supervised.worker
            self.kill_both(supervised)
            wait_until(lambda: state_of(worker) in (None, "Z"), what="the worker dead with its parent")
            assert alive() == titled
            if known_by == "its mark":  # this one was made after the last record, and hangs from nobody
                os.kill(min(titled), signal.SIGUSR1)
                wait_until(lambda: len(pids.read_text().split()) == 3, what="a process that ran away")
                assert len(alive()) == 2
            supervised.start(SERVING, "arrived", "obey=0")
            wait_until(lambda: not alive(), what="the sweep")
            wait_until(lambda: "Cleaned up after an earlier worker" in supervised.text)
            assert "processes=2" in supervised.text
        finally:
            for pid in alive():
                os.kill(pid, signal.SIGKILL)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_in_a_directory_whose_name_is_not_text(self, supervised, hurt):
        """Not UTF-8, that is: the kernel takes any bytes."""
        self.kill_both(supervised)
        odd = Path(os.fsdecode(os.fsencode(supervised.tmp) + b"/odd\xff"))
        odd.mkdir()
        supervised.environment["TMPDIR"] = str(odd)
        supervised.start("child=stubborn.py", SERVING, "arrived", "hang")
        self.kill_both(supervised)
        supervised.start(SERVING, "arrived", "obey=0")
        wait_until(lambda: len(list(odd.glob("dw-*"))) == 1, what="sweep")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        assert list(odd.iterdir()) == []
        odd.rmdir()
        supervised.environment["TMPDIR"] = str(supervised.tmp)
        supervised.start("exit=4")
        supervised.gone()

    def test_a_registration_elsewhere_is_left_to_expire(self, supervised):
        """What a dead worker has recorded may be forged; only our own discovery directory is ours to clean."""
        root = supervised.base / "elsewhere"
        supervised.start(f"register-file={root}:{INSTANCE}", SERVING, "arrived", "hang")
        self.kill_both(supervised)
        supervised.environment["DYN_FILE_KV"] = str(supervised.base / "ours")
        supervised.start(SERVING, "arrived", "obey=0")
        wait_until(lambda: "Cleaned up after an earlier worker" in supervised.text)
        assert f"{root} is not the discovery directory of this worker" in supervised.text
        assert registered(root)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_nobody_reads_the_log_of_the_sweep(self, supervised, hurt):
        """It goes on with the next directory when its log is a broken pipe."""
        self.kill_both(supervised)
        (stale,) = supervised.run_directories
        shutil.copytree(stale, supervised.tmp / "dw-1-abcdef")
        reading, writing = os.pipe()
        os.close(reading)
        supervised.start(SERVING, "arrived", "obey=0", stderr=writing)
        os.close(writing)
        wait_until(lambda: len(supervised.run_directories) == 1, what="both swept")
        supervised.signal(signal.SIGTERM)
        supervised.wait()

    def test_the_sweep_waits_a_moment_for_who_reads_its_log(self, supervised, hurt):
        self.kill_both(supervised)
        code = """if True:
            import os, sys, time
            from dynamo_worker.supervisor import report, run_directory, sweep
            from dynamo_worker.supervisor.output import write_now
            report.LAST_OUTPUT = 10
            reading, writing = os.pipe()
            os.dup2(writing, 2)
            os.close(writing)
            log, own = report.Log("ours"), run_directory.RunDirectory.create()
            try:
                while write_now(2, b"x" * 4096):
                    pass
            except BlockingIOError:
                log.info("waits")
            sweep.sweep_in_background(own, os.environ["DYN_FILE_KV"], log)
            own.remove(1e12)
            while os.path.exists(sys.argv[1]):
                time.sleep(0.01)
            os.close(2)
            with open(reading) as file:
                print(*file.read().lstrip("x").splitlines(), sep="\\n")
        """
        (stale,) = supervised.run_directories
        done = subprocess.run(
            [sys.executable, "-c", code, stale], env=supervised.environment, stdout=subprocess.PIPE, text=True
        )
        (line,) = done.stdout.splitlines()
        assert "Cleaned up after an earlier worker" in line

    def test_the_sweep_leaves_the_living_alone(self, supervised, tmp_path):
        from .conftest import Supervised

        supervised.start(SERVING, "arrived", "obey=0")
        (tmp_path / "second").mkdir()
        second = Supervised(tmp_path / "second")
        try:
            second.environment["TMPDIR"] = str(supervised.tmp)
            second.start(SERVING, "arrived", "obey=0")
            assert len(supervised.run_directories) == 2
            second.signal(signal.SIGTERM)
            assert second.wait() == 0
            assert supervised.process.poll() is None
            assert len(supervised.run_directories) == 1
        finally:
            second.end()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0


@pytest.fixture
def no_more_processes(supervised, tmp_path):
    """Returns a function after which nobody of the tree can fork any more, as with the pids limit reached."""
    full = tmp_path / "full"
    supervised.patch(f"""
        import errno, os
        fork = os.fork
        def refuse():
            if os.path.exists({str(full)!r}):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return fork()
        os.fork = refuse
    """)
    return full.touch


class TestNoMoreProcesses:
    """Cleaning must not need one."""

    def test_the_worker_is_killed(self, supervised, no_more_processes, hurt):
        no_more_processes()
        os.kill(supervised.worker, signal.SIGKILL)
        assert supervised.wait() == 137
        assert 'Cannot fork a process to leave discovery next="continuing without one"' in supervised.text
        assert "Guardian died" not in supervised.text
        assert 'withdrawn="file: 2 files removed"' in supervised.text
        supervised.gone(0.5)

    def test_the_supervisor_is_killed(self, supervised, no_more_processes, hurt):
        no_more_processes()
        supervised.signal(signal.SIGKILL)
        supervised.gone()
        assert not registered(hurt)

    def test_the_guardian_is_killed(self, supervised, no_more_processes, hurt):
        no_more_processes()
        os.kill(supervised.guardian, signal.SIGKILL)
        assert supervised.wait() == 1
        assert not registered(hurt)
        supervised.gone(0.5)

    def test_a_stop(self, supervised, no_more_processes):
        root = supervised.base / "discovery"
        supervised.start(f"register-file={root}:{INSTANCE}", *TREE, SERVING, "arrived", "obey=0")
        no_more_processes()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        assert not registered(root)
        supervised.gone(0.5)

    def test_a_discovery_server_that_does_not_answer(self, supervised, no_more_processes):
        """Asked without a process of its own, it still cannot hold the cleaning up."""
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            supervised.environment["ETCD_ENDPOINTS"] = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            supervised.start("register-etcd=4ec5c2a6e8130c29", "child=stubborn.py", SERVING, "arrived", "hang")
            no_more_processes()
            started = time.monotonic()
            os.kill(supervised.worker, signal.SIGKILL)
            assert supervised.wait() == 137
            assert time.monotonic() - started < 10
            assert "Registration not withdrawn" in supervised.text
            supervised.take_the_record(0.5)

    def test_not_even_the_guardian(self, supervised, no_more_processes):
        no_more_processes()
        supervised.start("hang")
        assert supervised.wait() == 3
        assert "guardian process: Resource temporarily unavailable (raise the limits of processes" in supervised.text

    @pytest.mark.parametrize("who", ["guardian", "supervisor"])
    def test_after_the_guardian(self, supervised, who):
        """The guardian cannot start the worker, as with a pids limit of 2; or the supervisor cannot sweep."""
        stale = supervised.tmp / "dw-1-abcdef"
        stale.mkdir()
        supervised.patch(f"""
            import errno, os
            fork, forks, supervisor = os.fork, [], os.getpid()
            def refuse():
                forks.append(os.getpid())
                if len(forks) > 1 and (os.getpid() == supervisor) == {who == "supervisor"}:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                return fork()
            os.fork = refuse
        """)
        supervised.start("exit-message=2:usage", "exit=2")
        code = supervised.wait()
        stale.rmdir()
        if who == "guardian":
            assert code == 3
            assert "cannot fork the worker process: Resource temporarily unavailable" in supervised.text
        else:
            assert code == 2
            assert "Cleaning up after an earlier worker failed" in supervised.text


def test_no_more_descriptors_for_what_the_guardian_records(supervised, tmp_path):
    """A shortage on the whole machine, for a while: the worker goes on serving, and is cleaned up behind as ever."""
    full, tried, go, made = (tmp_path / name for name in ("full", "tried", "go", "made"))
    supervised.patch(f"""
        import errno, os
        listdir = os.listdir
        def refuse(path="."):
            if path == "/proc" and os.path.exists({str(full)!r}):
                with open({str(tried)!r}, "a") as file:
                    file.write("x")
                raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
            return listdir(path)
        os.listdir = refuse
    """)
    supervised.start(SERVING, "arrived", f"await={go}", "child=shm_leaker.py", f"touch={made}", "hang")
    full.touch()
    go.touch()
    wait_until(made.exists)
    wait_until(tried.exists)
    time.sleep(1.5)
    assert supervised.process.poll() is None
    assert tried.stat().st_size < 10, "it does nothing else any more"
    full.unlink()
    os.kill(supervised.worker, signal.SIGKILL)
    assert supervised.wait() == 137
    assert "Guardian died" not in supervised.text


@pytest.fixture
def pids_limit():
    """A cgroup of this test's own whose number of processes can be limited; returns its directory."""
    parent = pids_cgroup()
    if parent is None:
        pytest.skip("no cgroup to limit processes in")
    group = parent / f"dwtest-{os.urandom(4).hex()}"
    group.mkdir()
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text().split())
    group.rmdir()


class TestPidsLimit:
    """The same with the kernel's own limit, and a child that uses up what the killing sets free."""

    @pytest.fixture
    def full(self, supervised, pids_limit):
        root = supervised.base / "discovery"

        def start(*steps):
            (pids_limit / "pids.max").write_text("40")
            supervised.start(
                f"register-file={root}:{INSTANCE}", "child=stubborn.py", "child=crowd.py", SERVING, "arrived", *steps,
                preexec_fn=lambda: (pids_limit / "cgroup.procs").write_text(str(os.getpid())),
            )  # fmt: skip
            wait_until(lambda: int((pids_limit / "pids.current").read_text()) >= 40)

        yield start
        assert not registered(root)

    def test_the_worker_is_killed(self, supervised, full):
        full("hang")
        os.kill(supervised.worker, signal.SIGKILL)
        assert supervised.wait() == 137
        supervised.gone(0.5)

    def test_the_supervisor_is_killed(self, supervised, full):
        full("hang")
        supervised.signal(signal.SIGKILL)
        supervised.gone()

    def test_a_stop(self, supervised, full):
        full("obey=0")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        supervised.gone(0.5)


class TestCleanEnd:
    def test_leftovers_of_an_obedient_worker_are_removed(self, supervised):
        supervised.start(*TREE, SERVING, "arrived", "obey=0")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        supervised.gone(0.5)

    def test_a_guardian_that_ends_without_having_read_everything(self, supervised, tmp_path):
        """Its report counts all the same: nobody is told that the guardian was lost."""
        begun, go = tmp_path / "begun", tmp_path / "go"
        supervised.patch(f"""
            import dynamo_worker.supervisor.cleanup as m, os, time
            run = m.Cleanup.run
            def late(self):
                open({str(begun)!r}, "w").close()
                while not os.path.exists({str(go)!r}):
                    time.sleep(0.005)
                return run(self)
            m.Cleanup.run = late
        """)
        supervised.start(SERVING, "arrived", "obey=0")
        guardian = supervised.guardian
        supervised.signal(signal.SIGTERM)
        wait_until(begun.exists)
        time.sleep(0.2)  # the supervisor tells it the deadline
        supervised.signal(signal.SIGSTOP)
        go.touch()
        wait_until(lambda: state_of(guardian) == "Z")
        supervised.signal(signal.SIGCONT)
        assert supervised.wait() == 0
        assert "Guardian died" not in supervised.text
        assert "cleaned_in=" in supervised.text

    def test_zombies_are_reaped_while_it_runs(self, supervised):
        supervised.start("child=zombie_maker.py", SERVING, "arrived", "obey=0")
        pids = [*supervised.children_of(supervised.guardian), *supervised.children_of(supervised.pid)]
        wait_until(lambda: not [pid for pid in supervised.children_of(supervised.guardian) if state_of(pid) == "Z"])
        assert pids
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_run_directory_that_cannot_be_removed(self, supervised):
        """It is said why, and the exit code stays."""
        if os.geteuid() != 0:
            pytest.skip("only root can mount")
        supervised.start("temp", SERVING, "arrived", "obey=0")
        (run_directory,) = supervised.run_directories
        place = run_directory / "tmp" / "left"
        if subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True).returncode:
            pytest.skip("cannot mount here")
        try:
            supervised.signal(signal.SIGTERM)
            assert supervised.wait() == 0
            assert "Run directory not removed" in supervised.text
            assert "busy" in supervised.text
        finally:
            subprocess.run(["umount", str(place)], check=True)
        supervised.start("exit=3")  # and now it can be
        assert supervised.wait() == 3
        supervised.gone()

    @pytest.mark.parametrize("killed", ["worker", "guardian"])
    def test_directories_deeper_than_any_path(self, supervised, killed):
        supervised.start("deep=2100", SERVING, "arrived", "hang")
        os.kill(getattr(supervised, killed), signal.SIGKILL)
        assert supervised.wait() == (137 if killed == "worker" else 1)
        assert "not removed" not in supervised.text
        assert not supervised.run_directories

    def test_read_only_directories_are_removed(self, supervised):
        supervised.start("temp", SERVING, "arrived", "obey=0")
        (run_directory,) = supervised.run_directories
        (run_directory / "tmp/left/behind").chmod(0)
        (run_directory / "tmp/left").chmod(0o500)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_signals_while_cleaning_do_not_change_the_verdict(self, supervised):
        """A discovery server that does not answer keeps the cleaning busy; a second signal leaves it behind."""
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            supervised.environment["ETCD_ENDPOINTS"] = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            supervised.start("register-etcd=4ec5c2a6e8130c29", SERVING, "arrived", "hang")
            worker = supervised.worker
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: state_of(worker) is None)
            started = time.monotonic()
            supervised.signal(signal.SIGTERM)
            time.sleep(0.15)
            supervised.signal(signal.SIGTERM)
            assert supervised.wait() == 137
            assert time.monotonic() - started < 2.0
            assert "leaving at once" in supervised.text
            supervised.take_the_record(5.0)
            supervised.gone(2.0)


def test_another_pid_namespace_without_locks(supervised, tmp_path, monkeypatch):
    """Nothing tells from here whether that worker lives: it is left alone."""
    if subprocess.run(["unshare", "-fp", "--mount-proc", "true"], capture_output=True).returncode:
        pytest.skip("no pid namespaces here")
    (tmp_path / "sitecustomize.py").write_text(
        "import fcntl\ndef refuse(*_):\n    raise OSError(38, 'Function not implemented')\nfcntl.flock = refuse\n"
    )
    supervised.environment["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    supervised.start(SERVING, "arrived", "obey=0", shell_wrapper='exec unshare -fp --mount-proc "$0" "$@"')

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    (run_directory,) = supervised.run_directories
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        assert RunDirectory.take_over(str(run_directory)) is None
    (init,) = supervised.children_of(supervised.pid)
    os.kill(init, signal.SIGTERM)
    assert supervised.wait() == 0


class TestPid1:
    def test_as_pid_1_of_a_namespace(self, supervised, tmp_path):
        """The kernel gives pid 1 no default actions and kills everything when it ends."""
        if subprocess.run(["unshare", "-fp", "--mount-proc", "true"], capture_output=True).returncode:
            pytest.skip("no pid namespaces here")
        supervised.start(
            "child=forker.py", "child=zombie_maker.py", "child=shm_tracked.py", SERVING, "arrived", "hang",
            shell_wrapper='exec unshare -fp --mount-proc "$0" "$@"',
        )  # fmt: skip
        (init,) = supervised.children_of(supervised.pid)
        os.kill(init, signal.SIGTERM)
        wait_until(lambda: "level=1" in supervised.text)
        time.sleep(0.12)
        os.kill(init, signal.SIGTERM)
        time.sleep(0.12)
        os.kill(init, signal.SIGINT)
        supervised.wait()
        assert "Worker stopped code=1" in supervised.text


def test_without_pidfd(supervised, tmp_path):
    """Seccomp profiles and old kernels refuse pidfd_open; SIGCHLD and start times have to do."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\ndef refuse(*_):\n    raise PermissionError(1, 'refused')\nos.pidfd_open = refuse\n"
    )
    supervised.environment["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"
    supervised.start(*TREE, SERVING, "arrived", "hang")
    os.kill(supervised.worker, signal.SIGKILL)
    assert supervised.wait() == 137
