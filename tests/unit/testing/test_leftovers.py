"""The check for leftovers finds what is left, and nothing else."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dynamo_worker.testing import leftovers as module
from dynamo_worker.testing.leftovers import MARKER, Leftovers, marked_processes
from dynamo_worker.testing.waiting import eventually

REAL = Path(module.SHARED_MEMORY)
SLEEP = "print('up', flush=True); import time; time.sleep(60)"


@pytest.fixture
def marker():
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def segments(tmp_path_factory, monkeypatch):
    """Look at a directory of the test's own: other programs on the machine have segments too."""
    directory = tmp_path_factory.mktemp("shm")
    monkeypatch.setattr(module, "SHARED_MEMORY", str(directory))
    return directory


@pytest.fixture
def leftovers(marker, tmp_path):
    return Leftovers(marker, tmp_path)


@contextlib.contextmanager
def child(marker, program=SLEEP, **options):
    environment = {**os.environ, **({MARKER: marker} if marker else {})}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, **options
    )
    try:
        assert process.stdout.readline().startswith("up")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def segment(directory):
    path = directory / f"psm_{uuid.uuid4().hex[:8]}"
    path.write_bytes(b"\0" * mmap.PAGESIZE)
    try:
        yield path
    finally:
        path.unlink()


def test_nothing_is_left_when_nothing_was_there(leftovers):
    leftovers.check()


def test_gpu_memory_that_is_not_given_back(leftovers, monkeypatch):
    monkeypatch.setattr(module, "gpu_memory", lambda: leftovers._gpu_memory + (10 << 20))
    leftovers.check()
    monkeypatch.setattr(module, "gpu_memory", lambda: leftovers._gpu_memory + (900 << 20))
    with pytest.raises(AssertionError, match="GPU memory: 900 MiB more in use than before"):
        leftovers.check(timeout=0)


def test_a_process_is_found_by_its_marker(leftovers, marker):
    with child(marker) as process, child(uuid.uuid4().hex), child(None):
        (line,) = leftovers.find()
        assert line.startswith(f"process {process.pid}: ")
        assert "time.sleep" in line
    leftovers.check()


def test_a_process_is_found_however_far_it_strayed(marker):
    """A new session, its parent gone, its directory changed: the environment stays."""
    program = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid(); os.chdir('/')\n"
        "print('up', os.getpid(), flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    environment = {**os.environ, MARKER: marker}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline().split()[1])
        parent.wait()
        assert list(marked_processes(marker)) == [pid]
        Leftovers(marker, Path("/nonexistent")).remove()
        eventually(lambda: not marked_processes(marker), 5)


def test_the_dead_do_not_count(marker):
    with child(marker) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert marked_processes(marker) == {}


def test_the_process_that_looks_does_not_count(marker):
    program = f"from dynamo_worker.testing.leftovers import marked_processes; print(marked_processes({marker!r}))"
    environment = {**os.environ, MARKER: marker}
    looked = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert looked.stdout.strip() == "{}"


def test_check_fails_and_kills(leftovers, marker):
    with child(marker) as process:
        with pytest.raises(AssertionError, match=f"process {process.pid}"):
            leftovers.check(timeout=0.05)
        assert process.wait(5) == -9


def test_check_waits_a_moment(leftovers, marker):
    with child(marker, "print('up', flush=True); import time; time.sleep(0.2)"):
        leftovers.check(timeout=10)


def test_shared_memory_is_found_unless_it_was_there_before(segments, marker, tmp_path):
    with segment(segments) as before:
        leftovers = Leftovers(marker, tmp_path)
        with segment(segments) as path:
            found = leftovers.find()
            assert found == [str(path)]
        assert leftovers.find() == []
        assert before.exists()


def test_shared_memory_of_other_programs_does_not_count(segments, leftovers, marker):
    """Something else on the machine may make segments while a test runs."""
    program = (
        "import mmap, sys, time\n"
        "file = open(sys.argv[1], 'r+b'); memory = mmap.mmap(file.fileno(), 0)\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    for owner, counts in ((None, False), (marker, True)):
        environment = {**os.environ, **({MARKER: owner} if owner else {})}
        with segment(segments) as path:
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(path)], env=environment, stdout=subprocess.PIPE
            )
            with process:
                assert process.stdout.readline() == b"up\n"
                assert (str(path) in leftovers.find()) == counts
                process.kill()


def test_the_kernels_directory_is_the_one_it_looks_at():
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=1)
    try:
        assert (REAL / memory.name).exists()
    finally:
        memory.close()
        memory.unlink()


def test_files_are_found(leftovers, tmp_path):
    (tmp_path / "dw-1").mkdir()
    (tmp_path / "socket").touch()
    assert leftovers.find() == [str(tmp_path / "dw-1"), str(tmp_path / "socket")]
    with pytest.raises(AssertionError, match="dw-1"):
        leftovers.check(timeout=0)
