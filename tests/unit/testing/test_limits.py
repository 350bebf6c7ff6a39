"""Limits hold for the process that is started, from the start on or from a moment on, and are gone afterwards."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from dynamo_worker.testing.limits import FILLING, limited, possible, shell
from dynamo_worker.testing.waiting import eventually


def run(limit, source):
    result = subprocess.run([*limit.prefix, sys.executable, "-c", source], capture_output=True, text=True, check=False)
    return result.stdout.strip() + result.stderr


def test_the_command_replaces_the_shell():
    process = subprocess.Popen(
        [*shell(""), sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1, text=True
    )
    assert process.communicate()[0].strip() == str(process.pid)


@pytest.mark.parametrize(
    ("name", "amount", "constant", "value"),
    [
        ("files", 20, "RLIMIT_NOFILE", 20),
        ("file size", 4096, "RLIMIT_FSIZE", 4096),
        ("memory", 600_000, "RLIMIT_AS", 600_000 << 10),
        ("none", None, "RLIMIT_CORE", 0),
    ],
)
def test_a_limit_from_the_start_on(tmp_path, name, amount, constant, value):
    with limited(name, amount, tmp_path) as limit:
        assert run(limit, f"import resource; print(resource.getrlimit(resource.{constant})[0])") == str(value)


def test_descriptors_that_run_short(tmp_path):
    with limited("files", None, tmp_path) as limit:
        source = "print(flush=True); input(); open('/dev/null')"
        process = subprocess.Popen(
            [*limit.prefix, sys.executable, "-c", source], stdin=-1, stdout=-1, stderr=-1, text=True
        )
        process.stdout.readline()
        limit.tighten([process.pid])
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] < 20
        assert "Too many open files" in process.communicate("\n")[1]


@pytest.mark.skipif(not possible("pids"), reason="no cgroup can be made here")
def test_tasks_that_run_short(tmp_path):
    with limited("pids", None, tmp_path) as limit:
        source = "import os, threading; print(flush=True); input(); threading.Thread(target=input).start()"
        process = subprocess.Popen(
            [*limit.prefix, sys.executable, "-c", source], stdin=-1, stdout=-1, stderr=-1, text=True
        )
        process.stdout.readline()
        limit.tighten([process.pid])
        assert "can't start new thread" in process.communicate("\n")[1]


@pytest.mark.skipif(not possible("tmp"), reason="nothing can be mounted here")
def test_room_that_runs_short(tmp_path):
    with limited("tmp", None, tmp_path) as limit:
        (tmp_path / "before").write_bytes(b"x" * 4096)
        limit.tighten([])
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "after").write_bytes(b"x" * 100_000)
        assert {path.name for path in tmp_path.iterdir()} == {"before", "after", FILLING}
    eventually(lambda: os.listdir(tmp_path) == [], 5, "the mount to be gone")
