from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from dynamo_worker.supervisor import linux, run_directory
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.run_directory import RunDirectory


@pytest.fixture
def place(monkeypatch):
    path = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are too long for unix sockets
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    shutil.rmtree(path)


def ourselves() -> Process:
    stat = linux.read_stat(os.getpid())
    assert stat is not None
    return Process(os.getpid(), stat.start)


def later() -> float:
    return time.monotonic() + 10


def refuse_to_lock(*_) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse_to_lock)


def test_create_and_remove(place):
    directory = RunDirectory.create()
    assert os.path.dirname(directory.path) == str(place)
    assert os.path.basename(directory.path).startswith(f"dw-{os.getpid()}-")
    assert os.stat(directory.path).st_mode & 0o777 == 0o700
    deep = os.path.join(directory.temporary, *["d" * 200] * 10)
    os.makedirs(deep)
    outside = place / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    os.symlink(outside, os.path.join(directory.temporary, "link"))
    os.symlink("/nonexistent", os.path.join(directory.temporary, "broken"))
    os.mkfifo(os.path.join(directory.temporary, "fifo"))
    assert directory.remove(later()) == []
    assert os.listdir(place) == ["outside"]
    assert (outside / "precious").exists()
    assert directory.remove(later()) == []  # again: nothing to do, no problem
    directory.close()


def test_falls_back_when_tmpdir_cannot_be_used(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    directory = RunDirectory.create()
    assert directory.base == "/tmp"
    assert directory.trouble == ["/nonexistent: No such file or directory"]
    directory.remove(later())
    directory.close()


def test_in_a_working_directory_that_is_gone(place):
    gone = place / "gone"
    gone.mkdir()
    code = """if True:
        import os
        from dynamo_worker.supervisor.run_directory import RunDirectory
        os.rmdir(os.getcwd())
        directory = RunDirectory.create()
        print(directory.base)
        directory.remove(1e12)
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TEMP", "TMP")}
    done = subprocess.run([sys.executable, "-c", code], cwd=gone, env=environment, capture_output=True, text=True)
    assert done.stdout == "/tmp\n", done.stderr


def test_no_place_at_all(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr(run_directory, "_USUAL_PLACES", ())
    monkeypatch.delenv("TEMP", raising=False)
    monkeypatch.delenv("TMP", raising=False)
    with pytest.raises(FileNotFoundError, match=r"/nonexistent: No such file or directory .*set TMPDIR"):
        RunDirectory.create()


def test_a_full_disk(place, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_directory, "_USUAL_PLACES", ())
    monkeypatch.setattr(os, "pwrite", full)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=f"{place}: No space left on device .*make room"):
        RunDirectory.create()
    assert os.listdir(place) == []
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


@pytest.mark.parametrize("options", ["size=8k", "size=8m,nr_inodes=20"])
def test_a_disk_that_is_nearly_full(place, monkeypatch, options):
    """The worker could not even write down that it is registered."""
    monkeypatch.setattr(run_directory, "_USUAL_PLACES", ())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(OSError, match=rf"{place}: full \(.* bytes free, .* files\) \(make room, or set TMPDIR"):
            RunDirectory.create()
        assert os.listdir(place) == []
    finally:
        subprocess.run(["umount", place], check=True)


class TestOthers:
    """Whoever could put something in the directory's place must not be able to."""

    @pytest.mark.parametrize("mode", [0o777, 0o2777, 0o770])
    def test_a_place_of_ours_where_others_may_write(self, place, mode):
        """Such as the volume `emptyDir` of Kubernetes for root."""
        place.chmod(mode)
        directory = RunDirectory.create()
        assert place.stat().st_mode & 0o7777 == mode | 0o1000
        assert directory.base == str(place)
        assert directory.trouble == [f"{place}: others may write there; the sticky bit was set"]
        directory.remove(later())
        directory.close()

    def test_a_place_below_one_where_others_may_write(self, place, monkeypatch):
        below = place / "below"
        below.mkdir()
        place.chmod(0o777)
        monkeypatch.setenv("TMPDIR", str(below))
        directory = RunDirectory.create()
        assert directory.base == "/tmp"
        (problem,) = directory.trouble
        assert problem == f"{below}: others may write in {place}, which has no sticky bit (chmod go-w {place}, or +t)"
        assert place.stat().st_mode & 0o7777 == 0o777  # nobody asked us to change that one
        directory.remove(later())
        directory.close()

    @pytest.mark.parametrize("mode", [0o777, 0o2775])
    def test_a_place_that_is_not_used_is_not_changed(self, place, monkeypatch, mode):
        below = place / "below"
        below.mkdir()
        for path in (place, below):
            path.chmod(mode)
        monkeypatch.setenv("TMPDIR", str(below))
        directory = RunDirectory.create()
        assert directory.base == "/tmp"
        assert [path.stat().st_mode & 0o7777 for path in (place, below)] == [mode, mode]
        directory.remove(later())
        directory.close()

    def test_a_link_on_the_way_to_it_may_lead_elsewhere_later(self, place, monkeypatch):
        """As its owner, or that of the directory it lies in, may have it do at any time."""
        for name in ("work", "other"):
            (place / name).mkdir()
        (place / "link").symlink_to(place / "work")
        monkeypatch.setenv("TMPDIR", str(place / "link"))
        directory = RunDirectory.create()
        (place / "link").unlink()
        (place / "link").symlink_to(place / "other")
        assert directory.base == str(place / "work")
        Path(directory.temporary, "prompt").touch()
        assert directory.remove(later()) == []
        assert os.listdir(place / "work") == os.listdir(place / "other") == []
        directory.close()

    def test_a_place_of_another_user(self, place):
        if os.geteuid() != 0:
            pytest.skip("only root can make one")
        os.chown(place, 12345, 12345)
        place.chmod(0o1777)  # its owner may rename what is in it all the same
        directory = RunDirectory.create()
        assert directory.base == "/tmp"
        assert directory.trouble == [f"{place}: {place} belongs to another user (12345)"]
        directory.remove(later())
        directory.close()

    def test_roots_place_without_the_sticky_bit(self, place, monkeypatch):
        """Such as `emptyDir` for everybody else: only its owner could set it."""
        if os.geteuid() != 0:
            pytest.skip("only root can make one")
        place.chmod(0o777)
        monkeypatch.setattr(run_directory, "_USUAL_PLACES", ())
        code = """if True:
            import os
            from dynamo_worker.supervisor import run_directory
            run_directory._USUAL_PLACES = ()
            os.setgid(12345); os.setuid(12345)
            try:
                run_directory.RunDirectory.create()
            except PermissionError as error:
                print(error.strerror)
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith(f"{place}: others may write in {place}, which has no sticky bit"), done.stderr
        assert f"(chmod go-w {place}, or +t)" in done.stdout
        assert os.listdir(place) == []

    def test_another_user_cannot_put_a_link_in_its_place(self, place):
        if os.geteuid() != 0:
            pytest.skip("needs a second user")
        victim = place / "victim"
        victim.mkdir()
        (victim / "precious").touch()
        place.chmod(0o777)
        directory = RunDirectory.create()
        code = """if True:
            import os, sys
            os.setgid(12345); os.setuid(12345)
            try:
                os.rename(sys.argv[1], sys.argv[1] + "x")
                os.symlink(sys.argv[2], sys.argv[1])
            except PermissionError:
                print("no")
        """
        done = subprocess.run([sys.executable, "-c", code, directory.path, str(victim)], capture_output=True, text=True)
        assert done.stdout == "no\n", done.stderr
        assert directory.remove(later()) == []
        assert sorted(os.listdir(place)) == ["victim"]
        directory.close()

    def test_a_link_in_its_place_is_left_alone(self, place):
        """As who owns both could make one."""
        directory = RunDirectory.create()
        victim = place / "victim"
        (victim / "tmp").mkdir(parents=True)
        os.rename(directory.path, place / "moved")
        os.symlink(victim, directory.path)
        assert directory.remove(later()) == [f"{directory.path}: Not a directory"]
        assert (victim / "tmp").exists()
        assert os.listdir(place / "moved") == []
        directory.close()

    def test_in_a_user_namespace_that_does_not_know_root(self, place, monkeypatch):
        """As in a container of Apptainer: all that is root's belongs to nobody there."""
        if os.geteuid() != 0:
            pytest.skip("only root can make such a place")
        os.chown(place, 12345, 12345)
        place.chmod(0o1777)
        monkeypatch.setattr(linux, "unmapped_user", lambda: 12345)
        directory = RunDirectory.create()
        assert directory.base == str(place)
        directory.remove(later())
        directory.close()


class TestUnixSockets:
    """Their paths have 107 bytes, and engines make some in the worker's TMPDIR."""

    def bind(self, directory: RunDirectory) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(directory.temporary, str(uuid.uuid4())))  # as vLLM does

    @pytest.mark.parametrize("length", [48, 49, 200])
    def test_a_long_place(self, place, monkeypatch, length):
        longer = place / ("x" * (length - len(str(place)) - 1))
        longer.mkdir()
        monkeypatch.setenv("TMPDIR", str(longer))
        directory = RunDirectory.create()
        self.bind(directory)
        assert directory.base == (str(longer) if length == 48 else "/tmp")
        expected = [f"{longer}: too long for unix sockets in it ({length} bytes; 48 at most)"]
        assert directory.trouble == ([] if length == 48 else expected)
        directory.remove(later())
        directory.close()

    def test_no_shorter_place(self, place, monkeypatch):
        longer = place / ("x" * 60)
        longer.mkdir()
        monkeypatch.setenv("TMPDIR", str(longer))
        monkeypatch.setattr(run_directory, "_USUAL_PLACES", ())
        directory = RunDirectory.create()
        assert directory.base == str(longer)
        assert "too long for unix sockets" in directory.trouble[0]
        directory.remove(later())
        directory.close()


def test_a_disk_that_is_full_by_the_time_the_owners_are_known(place, monkeypatch):
    directory = RunDirectory.create()
    size = os.stat(os.path.join(directory.path, "owner")).st_size
    directory.record_owners([Process(2**22 - number, 2**40) for number in range(20)])
    assert os.stat(os.path.join(directory.path, "owner")).st_size == size  # needs no room
    directory.remove(later())
    directory.close()


def test_systemd_tmpfiles_is_kept_away(place):
    """It takes a lock on every directory it enters, and leaves one alone that is locked."""
    directory = RunDirectory.create()
    descriptor = os.open(directory.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    directory.remove(later())
    directory.close()
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_no_time_left(place):
    directory = RunDirectory.create()
    for number in range(300):
        os.mkdir(os.path.join(directory.temporary, str(number)))
    (problem,) = directory.remove(time.monotonic() - 1)
    assert "the next start removes the rest" in problem
    assert os.path.exists(os.path.join(directory.path, "owner"))
    directory.remove(later())
    directory.close()


class TestTakeOver:
    def test_a_living_owner_keeps_it(self, place):
        directory = RunDirectory.create()
        directory.record_owners([Process(999999999, 1)])
        assert RunDirectory.take_over(directory.path) is None  # the lock says so, whatever the pids are
        directory.remove(later())
        directory.close()

    def test_recorded_owners_count_where_locks_do_not_work(self, place, no_locks):
        directory = RunDirectory.create()
        directory.record_owners([ourselves()])
        assert RunDirectory.take_over(directory.path) is None
        directory.record_owners([Process(999999999, 1)])
        taken = RunDirectory.take_over(directory.path)
        assert taken is not None
        taken.remove(later())
        taken.close()
        directory.close()

    @pytest.mark.parametrize("locks", ["none", "that keep nobody out"])
    def test_pids_of_another_namespace_are_not_believed(self, place, monkeypatch, locks):
        """The owner lives in another container, or on another machine; there is no lock to tell."""
        monkeypatch.setattr(fcntl, "flock", refuse_to_lock if locks == "none" else lambda *_: None)
        monkeypatch.setattr(linux, "pid_space", lambda: "another/1")
        directory = RunDirectory.create()
        directory.record_owners([Process(999999999, 1)])
        monkeypatch.setattr(linux, "pid_space", lambda: "ours/1")
        assert RunDirectory.take_over(directory.path) is None
        assert os.path.isdir(directory.temporary)
        directory.close()

    def test_a_lock_is_believed_across_namespaces(self, place, monkeypatch):
        monkeypatch.setattr(linux, "pid_space", lambda: "another/1")
        directory = RunDirectory.create()
        directory.record_owners([ourselves()])
        directory.close()  # as the kernel does when the last owner dies
        monkeypatch.setattr(linux, "pid_space", lambda: "ours/1")
        taken = RunDirectory.take_over(directory.path)
        assert taken is not None
        assert not taken.knows_its_pids
        taken.remove(later())
        taken.close()

    def test_a_sweep_cannot_get_in_before_the_lock(self, place, monkeypatch):
        lock = fcntl.flock
        held = []

        def sweep_first(descriptor, operation):
            monkeypatch.setattr(fcntl, "flock", lock)
            for path in run_directory.candidates(str(place)):
                if os.path.exists(os.path.join(path, "owner")):
                    held.append(os.open(os.path.join(path, "owner"), os.O_RDWR))
                    lock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", sweep_first)
        directory = RunDirectory.create()
        for descriptor in held:
            os.close(descriptor)
        with open(os.path.join(directory.path, "owner")) as owner, pytest.raises(BlockingIOError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.remove(later())
        directory.close()

    def test_one_whose_maker_was_killed_half_way(self, place, monkeypatch):
        monkeypatch.setattr(run_directory, "_OWNER", "owner~")
        directory = RunDirectory.create()
        monkeypatch.undo()
        owner = os.path.join(directory.path, "owner~")
        os.truncate(owner, 0)
        directory.close()
        assert RunDirectory.take_over(directory.path) is None
        os.utime(owner, (1, 1))
        taken = RunDirectory.take_over(directory.path)
        assert taken is not None
        assert taken.remove(later()) == []
        assert os.listdir(place) == []
        taken.close()

    def test_a_reused_pid_is_not_the_owner(self, place):
        directory = RunDirectory.create()
        directory.record_owners([Process(os.getpid(), ourselves().start - 1)])
        directory.close()
        taken = RunDirectory.take_over(directory.path)
        assert taken is not None
        assert RunDirectory.take_over(directory.path) is None  # one sweep at a time
        taken.remove(later())
        taken.close()

    def test_an_illegible_owner(self, place):
        directory = RunDirectory.create()
        directory.close()
        owner = os.path.join(directory.path, "owner")
        for text in ("", "garbage", "[]", '{"owners": 3}', "[[1, 2]]", '{"owners": [[Infinity, 1]]}', "[" * 4000):
            with open(owner, "w") as file:
                file.write(text)
            assert RunDirectory.take_over(directory.path) is None
        os.utime(owner, (1, 1))
        taken = RunDirectory.take_over(directory.path)
        assert taken is not None
        taken.remove(later())
        taken.close()

    def test_what_only_looks_like_one(self, place):
        file, empty, link, trap, fifo = (place / f"dw-{number}-abcdef" for number in range(5))
        file.touch()
        empty.mkdir()
        link.symlink_to(empty)
        trap.mkdir()
        (trap / "owner").symlink_to("/etc/passwd")
        fifo.mkdir()
        os.mkfifo(fifo / "owner")
        assert len(run_directory.candidates(str(place))) == 5
        assert [RunDirectory.take_over(path) for path in run_directory.candidates(str(place))] == [None] * 5
        assert run_directory.candidates(str(place / "missing")) == []

    @pytest.mark.parametrize("name", ["dw-shapes", "dw-1", "dw-1-abc", "dw-1-abcdef7", "dw-x-abcdef", "dw-1-ABCDEF"])
    def test_names_of_others(self, place, name):
        """A file `owner` is nothing special, and old or without a legible record it would cost the directory."""
        (place / name).mkdir()
        (place / name / "owner").touch()
        os.utime(place / name / "owner", (1, 1))
        assert run_directory.candidates(str(place)) == []

    @pytest.mark.parametrize("content", ["", "tmp", "tmp/file", "file"])
    def test_one_without_an_owner(self, place, content):
        """Its maker, or who removed it, was killed in between: then nothing can be in it."""
        path = place / "dw-1-abcdef"
        path.mkdir()
        if content:
            (path / content).mkdir(parents=True)
        assert RunDirectory.take_over(str(path)) is None
        assert path.exists(), "it may be in the making"
        os.utime(path, (1, 1))
        assert RunDirectory.take_over(str(path)) is None
        assert os.listdir(place) == ([] if content in ("", "tmp") else [path.name])
        assert path.joinpath(content).exists() == (content not in ("", "tmp"))

    @pytest.mark.parametrize("what", ["", "owner"])
    def test_one_that_others_may_write(self, place, what):
        directory = RunDirectory.create()
        directory.record_owners([Process(999999999, 1)])
        directory.close()
        os.chmod(os.path.join(directory.path, what), 0o770)
        assert RunDirectory.take_over(directory.path) is None
        assert os.path.isdir(directory.temporary)

    def test_of_another_user(self, place):
        if os.geteuid() != 0:
            pytest.skip("only root can make one")
        directory = RunDirectory.create()
        directory.record_owners([Process(999999999, 1)])
        directory.close()
        os.chown(directory.path, 12345, 12345)
        assert RunDirectory.take_over(directory.path) is None


def test_read_only_directories_as_an_ordinary_user(monkeypatch):
    """Root can do everything; so drop to somebody else for this one."""
    if os.geteuid() != 0:
        pytest.skip("needs to change users")
    place = tempfile.mkdtemp()  # pytest's own are closed to others
    os.chmod(place, 0o1777)
    monkeypatch.setenv("TMPDIR", place)
    code = """if True:
        import os, sys, time
        from dynamo_worker.supervisor.run_directory import RunDirectory
        os.setgid(12345); os.setuid(12345)
        d = RunDirectory.create()
        closed = os.path.join(d.temporary, "a", "b")
        os.makedirs(closed)
        open(os.path.join(closed, "f"), "w").close()
        os.chmod(closed, 0); os.chmod(os.path.dirname(closed), 0o500)
        print(d.remove(time.monotonic() + 5), os.path.exists(d.path))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    os.rmdir(place)
    assert done.stdout == "[] False\n", done.stderr
