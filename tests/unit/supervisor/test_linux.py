"""The calls that the standard library lacks, and what /proc says, against the running kernel."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.linux import Process

from .conftest import state_of, wait_until

#: Larger than any pid.
NOBODY = 2**22 + 1


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "60"]) as it:
        wait_until(lambda: linux.read_stat(it.pid).name == "sleep")
        yield it
        it.kill()


@pytest.fixture
def process(child) -> Process:
    return Process(child.pid, linux.read_stat(child.pid).start)


def python(code: str) -> str:
    """Return what a Python program prints that has `linux` and `os`."""
    program = f"import os, signal, sys, time; from dynamo_worker.supervisor import linux\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


class TestStat:
    def test_a_child(self, child):
        stat = linux.read_stat(child.pid)
        assert (stat.name, stat.parent, stat.group, stat.threads) == ("sleep", os.getpid(), os.getpgrp(), 1)
        assert not stat.ended

    @pytest.mark.parametrize("name", ["a) R 1 1", "((", "x y z", "ümläut"])
    def test_no_name_confuses_it(self, name):
        """A process names itself."""
        printed = python(f"linux.set_name({name!r}); print(linux.read_stat(os.getpid())[:3])")
        state, parent = printed.rsplit(", ", 2)[1:]
        assert state == "'R'"
        assert parent == f"{os.getpid()})"
        assert printed.startswith(f"({name!r}, ")

    def test_nobody(self):
        assert linux.read_stat(NOBODY) is None

    def test_a_zombie_has_ended(self, child, process):
        child.kill()
        wait_until(lambda: state_of(child.pid) == "Z")
        assert linux.read_stat(child.pid).ended
        assert not linux.is_alive(process)

    def test_a_thread_that_outlives_the_first_one_has_not(self):
        """Its process cannot be reaped, and may hold a GPU."""
        program = "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
        program += "print(flush=True)\nctypes.CDLL(None).pthread_exit(None)"
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as it:
            try:
                it.stdout.readline()
                wait_until(lambda: state_of(it.pid) == "Z")
                assert not linux.read_stat(it.pid).ended
            finally:
                it.kill()

    def test_all_pids(self, child):
        assert {os.getpid(), child.pid} <= set(linux.all_pids())


class TestSendSignal:
    @pytest.fixture(params=["pidfd", "no pidfd"])
    def way(self, request, monkeypatch):
        if request.param == "no pidfd":

            def refuse(*_):
                raise PermissionError(errno.EPERM, "refused")

            monkeypatch.setattr(os, "pidfd_open", refuse)

    @pytest.mark.usefixtures("way")
    def test_it_arrives(self, child, process):
        assert linux.is_alive(process)
        assert linux.send_signal(process, signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
        assert not linux.send_signal(process, signal.SIGTERM)

    @pytest.mark.usefixtures("way")
    def test_a_reused_pid_is_left_alone(self, child, process):
        later = Process(process.pid, process.start + 1)
        assert not linux.is_alive(later)
        assert not linux.send_signal(later, signal.SIGKILL)
        time.sleep(0.05)
        assert child.poll() is None

    @pytest.mark.usefixtures("way")
    def test_nobody(self):
        assert not linux.send_signal(Process(NOBODY, 1), signal.SIGKILL)

    def test_no_descriptor_is_left(self, process):
        descriptors = len(os.listdir("/proc/self/fd"))
        linux.send_signal(process, 0)
        linux.send_signal(Process(process.pid, 0), 0)
        assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    ("handler", "catches"), [("SIG_DFL", False), ("SIG_IGN", False), ("default_int_handler", True)]
)
def test_handlers(handler, catches):
    code = f"signal.signal(signal.SIGUSR1, signal.{handler}); print(linux.catches(os.getpid(), signal.SIGUSR1))"
    assert python(code) == str(catches)
    assert not linux.catches(NOBODY, signal.SIGUSR1)


def test_orphans_become_ours():
    code = """if True:
        linux.become_subreaper()
        ourselves = os.getpid()
        reading, writing = os.pipe()
        if os.fork() == 0:
            if os.fork() == 0:
                while os.getppid() != ourselves:
                    time.sleep(0.01)
                os.write(writing, b"adopted")
            os._exit(0)
        print(os.read(reading, 100).decode())
    """
    assert python(code) == "adopted"


def test_the_kernel_tells_of_the_parents_death(tmp_path):
    """The child is orphaned to nobody we know, so it leaves a file."""
    end = tmp_path / "end"
    code = f"""if True:
        def told(*_):
            open({str(end)!r}, "w").close()
            os._exit(0)
        parent = os.getpid()
        signal.signal(signal.SIGUSR1, told)
        reading, writing = os.pipe()
        if os.fork() == 0:
            print(linux.on_parent_death(signal.SIGUSR1, parent), linux.on_parent_death(signal.SIGUSR1, 1 << 23))
            sys.stdout.flush()
            os.close(1)
            os.write(writing, b"x")
            time.sleep(30)
            os._exit(1)
        os.read(reading, 1)
    """
    assert python(code) == "True False"
    wait_until(end.exists)


class TestWatch:
    @pytest.fixture
    def watch(self, tmp_path):
        descriptor = linux.watch_directory(str(tmp_path), linux.IN_CREATE | linux.IN_DELETE)
        yield descriptor
        os.close(descriptor)

    def test_what_happens_is_read_in_order(self, tmp_path, watch):
        assert linux.read_events(watch) == []
        for name in ("a", "b" * 200, "ümläut"):
            (tmp_path / name).touch()
        (tmp_path / "a").unlink()
        create, delete = linux.IN_CREATE, linux.IN_DELETE
        assert linux.read_events(watch) == [(create, "a"), (create, "b" * 200), (create, "ümläut"), (delete, "a")]
        assert linux.read_events(watch) == []

    def test_names_that_are_not_text(self, tmp_path, watch):
        name = os.fsdecode(b"x\xff")
        (tmp_path / name).touch()
        assert linux.read_events(watch) == [(linux.IN_CREATE, name)]

    def test_a_flood_keeps_us_no_longer_than_it_must(self, monkeypatch):
        """The rest is left for the next time."""
        event = (linux.IN_CREATE).to_bytes(4, sys.byteorder)
        reads = []

        def read(*_):
            reads.append(1)
            return bytes(4) + event + bytes(8)

        monkeypatch.setattr(os, "read", read)
        assert len(linux.read_events(0)) == len(reads) < 100

    def test_no_such_directory(self, tmp_path):
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FileNotFoundError, match="inotify_add_watch"):
            linux.watch_directory(str(tmp_path / "none"), linux.IN_CREATE)
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_pid_space_is_that_of_this_boot():
    boot, _, namespace = linux.pid_space().partition("/")
    assert len(boot) == 36
    assert int(namespace) == os.stat("/proc/self/ns/pid").st_ino
    assert python("print(linux.pid_space())") == linux.pid_space()


class TestMemoryKills:
    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("low 0\noom 2\noom_kill 1\noom_group_kill 0\n", 1),
            ("oom_kill_disable 0\noom_kill 7\n", 7),
            ("low 0\n", None),
        ],
        ids=["cgroup v2", "cgroup v1", "old kernel"],
    )
    def test_the_kernels_count(self, tmp_path, text, count):
        (tmp_path / "events").write_text(text)
        assert linux._memory_kills_in(str(tmp_path / "events")) == count

    def test_no_count(self, tmp_path):
        assert linux._memory_kills_in(str(tmp_path / "none")) is None
        (tmp_path / "events").write_text("oom_kill many\n")
        assert linux._memory_kills_in(str(tmp_path / "events")) is None

    def test_here(self):
        count = linux.memory_kills()
        assert count is None or count >= 0
