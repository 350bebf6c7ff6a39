"""The order of the cleaning, and that no step of it ends another."""

from __future__ import annotations

import os
import shutil
import tempfile
import time

import pytest

from dynamo_worker.supervisor import cleanup, gpu, ledger, process_tree, shared_memory
from dynamo_worker.supervisor.cleanup import Cleanup
from dynamo_worker.supervisor.report import Log
from dynamo_worker.supervisor.run_directory import RunDirectory

INSTANCE = "4ec5c2a6e8130c29"


@pytest.fixture
def left(tmp_path, monkeypatch):
    """A run directory with a registration and a segment to take back; returns the routine that does it."""
    place = tempfile.mkdtemp(prefix="dwt-")  # pytest's own are too long for unix sockets
    monkeypatch.setenv("TMPDIR", place)
    directory = RunDirectory.create()
    registration = tmp_path / "discovery" / INSTANCE
    registration.parent.mkdir()
    registration.touch()
    ledger.record_registration(directory.path, "file", INSTANCE, root=registration.parent)
    name = f"dwtest-cleanup-{os.getpid()}"
    path = f"/dev/shm/{name}"
    with open(path, "w"):
        ledger.write_segments(directory.path, [(name, os.stat(path).st_ino)])
    routine = Cleanup(
        directory, find=dict, reap=lambda: True, wait=lambda seconds, _: time.sleep(min(seconds, 0.01)), log=Log("test")
    )
    routine.traces = {"registration": str(registration), "segment": path, "directory": directory.path}
    yield routine
    directory.close()
    shutil.rmtree(place)
    if os.path.exists(path):
        os.unlink(path)


def remaining(routine):
    return {what for what, path in routine.traces.items() if os.path.exists(path)}


def test_everything_goes(left, capfd):
    report = left.run()
    assert remaining(left) == set()
    assert report["segments"] == 1
    assert report["withdrawn"] == ["file: 1 files removed"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RecursionError("deep"), MemoryError()])
@pytest.mark.parametrize(
    ("module", "name", "stays"),
    [
        (ledger, "registrations", {"registration"}),
        (cleanup, "Withdrawal", {"registration"}),
        (ledger, "read_segments", {"segment"}),
        (shared_memory, "in_use", set()),
        (gpu, "present", set()),
        (shared_memory, "remove_unused", {"segment"}),
        (RunDirectory, "remove", {"directory"}),
    ],
)
def test_no_step_ends_another(left, monkeypatch, capfd, module, name, stays, error):
    left._worker = 1  # has the GPUs looked at

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, name, fail)
    report = left.run()
    assert remaining(left) == stays
    assert report["seconds"] >= 0
    assert capfd.readouterr().err.count("Cleaning step failed") == 1


class TestTheKillFails:
    def test_for_a_moment(self, left, monkeypatch):
        monkeypatch.setattr(cleanup, "_RETRY_PAUSE", 0.01)
        attempts = []
        run = process_tree.Killing.run

        def fail_twice(killing, deadline):
            attempts.append(1)
            if len(attempts) < 3:
                raise OSError(23, "Too many open files in system")
            return run(killing, deadline)

        monkeypatch.setattr(process_tree.Killing, "run", fail_twice)
        left.run()
        assert left.stuck == []
        assert remaining(left) == set()

    def test_for_good(self, left, monkeypatch):
        def fail(*_):
            raise OSError(23, "Too many open files in system")

        monkeypatch.setattr(process_tree.Killing, "run", fail)
        left.deadline = time.monotonic() + 0.5
        left.run()
        assert left.stuck is None
        assert remaining(left) == {"directory"}  # for the next start, which looks for the processes
