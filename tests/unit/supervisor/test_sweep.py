"""What an earlier worker left is removed at the next start; the living are left alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynamo_worker.supervisor import discovery, ledger, linux, spawn, sweep
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.protocol import RUN_DIR
from dynamo_worker.supervisor.run_directory import RunDirectory

from .conftest import wait_until

INSTANCE = "4ec5c2a6e8130c29"


class Log:
    """Keeps what is logged in the process that logs it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict]] = []
        self.output = SimpleNamespace(forget=lambda: None)

    def info(self, message, **fields):
        self.lines.append((message, fields))

    warning = error = info

    def drain(self):
        pass


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def own(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="dwt-") as place:  # pytest's own are too long for unix sockets
        monkeypatch.setenv("TMPDIR", place)
        directory = RunDirectory.create()
        yield directory
        directory.close()


@pytest.fixture
def stale(own):
    """The directory of a worker whose owner was killed, with something in it."""
    code = (
        "from dynamo_worker.supervisor.run_directory import RunDirectory; import os; print(RunDirectory.create().path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.parent == Path(own.base)
    (path / "tmp" / "file").write_text("left")
    return path


@pytest.fixture
def orphan():
    """Returns a function that starts a process that is nobody's child here: what we have started is not swept."""
    pids = []

    def start(**environment):
        command = ["sh", "-c", "sleep 60 > /dev/null 2>&1 & echo $!"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        pid = int(done.stdout)
        wait_until(lambda: linux.read_stat(pid).name == "sleep")
        pids.append(Process(pid, linux.read_stat(pid).start))
        return pids[-1]

    yield start
    for process in pids:
        linux.send_signal(process, signal.SIGKILL)


def sweep_one(path, log, root):
    sweep._sweep(str(path), os.getpid(), str(root), log)


def test_a_directory_goes_with_the_registration_and_the_processes(stale, log, tmp_path, orphan):
    root = tmp_path / "discovery"
    card = root / "v1" / f"x%2F{INSTANCE}"
    card.parent.mkdir(parents=True)
    card.touch()
    ledger.record_registration(stale, "file", INSTANCE, root=root)
    left = orphan(**{RUN_DIR: str(stale)})
    sweep_one(stale, log, root)
    assert not linux.is_alive(left)
    assert not stale.exists()
    assert not card.exists()
    ((message, fields),) = log.lines
    assert message == "Cleaned up after an earlier worker"
    assert (fields["run_dir"], fields["processes"], fields["withdrawn"]) == (str(stale), 1, "file: 1 files removed")


def test_a_registration_that_could_not_be_withdrawn_is_tried_again(stale, log, tmp_path, monkeypatch):
    """At every start, until discovery answers; the rest of the directory goes at once."""
    ledger.record_registration(stale, "etcd", INSTANCE)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for _ in range(2):
            log.lines.clear()
            sweep_one(stale, log, tmp_path)
            message, fields = log.lines[0]
            assert message == "Registration not withdrawn"
            assert "Connection refused" in fields["outcome"]
            assert fields["next"] == "the next start on this machine tries again"
            assert sorted(path.name for path in stale.iterdir()) == ["ledger.jsonl", "owner"]
        monkeypatch.setattr(discovery, "_revoke", lambda *_: True)
        sweep_one(stale, log, tmp_path)
        assert log.lines[-1][1]["withdrawn"] == "etcd: lease revoked"
        assert not stale.exists()


def test_a_registration_is_not_tried_again_for_ever(stale, log, tmp_path, monkeypatch):
    ledger.record_registration(stale, "etcd", INSTANCE)
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
    sweep_one(stale, log, tmp_path)
    hours_ago = time.time() - 2 * 3600
    os.utime(stale, (hours_ago, hours_ago))
    sweep_one(stale, log, tmp_path)
    assert not stale.exists()


def test_recorded_processes_are_those_of_the_record_only(stale, log, tmp_path, orphan):
    """A pid may be another's by now; its start time tells."""
    left, other = orphan(), orphan()
    ledger.write_processes(stale, [left, Process(other.pid, other.start + 1)])
    sweep_one(stale, log, tmp_path)
    assert not linux.is_alive(left)
    assert linux.is_alive(other)


def test_our_own_processes_are_left_alone(stale, log, tmp_path):
    """Even those that were started from the dead worker's tree, as this one may have been."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, RUN_DIR: str(stale)}) as ours:
        wait_until(lambda: linux.read_stat(ours.pid).name == "sleep")
        sweep_one(stale, log, tmp_path)
        assert ours.poll() is None
        ours.kill()


def test_a_living_owner_keeps_its_directory(own, log, tmp_path):
    sweep_one(own.path, log, tmp_path)
    assert Path(own.path).exists()
    assert log.lines == []


def test_what_fails_does_not_keep_the_others_from_their_turn(stale, log, tmp_path, monkeypatch):
    def fail(path):
        raise RuntimeError("broken")

    monkeypatch.setattr(RunDirectory, "take_over", fail)
    sweep_one(stale, log, tmp_path)
    ((message, fields),) = log.lines
    assert message == "Cleaning up after an earlier worker failed"
    assert fields == {"run_dir": str(stale), "error": "RuntimeError: broken"}


@pytest.fixture
def background(own, log, tmp_path, monkeypatch):
    """Returns a function that sweeps in the background and returns the wait status of the process that did it."""
    pids, fork = [], spawn.fork

    def recorded():
        pids.append(fork())
        return pids[-1]

    def run():
        monkeypatch.setattr(spawn, "fork", recorded)
        sweep.sweep_in_background(own, str(tmp_path), log)
        return os.waitpid(pids[-1], 0)[1]

    return run


class TestInBackground:
    def test_the_caller_goes_on(self, own, stale, log, background):
        assert background() == 0
        assert not stale.exists()
        assert Path(own.path).exists()
        assert log.lines == [], "that was another process"

    def test_nothing_to_do_needs_no_process(self, own, log, tmp_path, monkeypatch):
        monkeypatch.setattr(spawn, "fork", lambda: pytest.fail("a process for nothing"))
        sweep.sweep_in_background(own, str(tmp_path), log)

    def test_signals_for_the_group_do_not_end_it(self, stale, tmp_path, monkeypatch, background):
        def clean_up(*_):
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
                os.kill(os.getpid(), number)
            (tmp_path / "done").touch()

        monkeypatch.setattr(sweep, "_clean_up", clean_up)
        assert background() == 0
        assert (tmp_path / "done").exists()

    def test_it_ends_in_time(self, stale, monkeypatch, background):
        monkeypatch.setattr(sweep, "_LIMIT", 1)
        monkeypatch.setattr(sweep, "_clean_up", lambda *_: signal.pause())
        assert os.WTERMSIG(background()) == signal.SIGALRM

    def test_no_more_processes(self, own, stale, log, tmp_path, monkeypatch):
        def refuse():
            raise BlockingIOError

        monkeypatch.setattr(spawn, "fork", refuse)
        with pytest.raises(BlockingIOError):
            sweep.sweep_in_background(own, str(tmp_path), log)
        assert stale.exists()
