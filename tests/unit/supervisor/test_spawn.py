"""How processes are started: what they inherit, and what happens if they cannot be."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from dynamo_worker.supervisor import mark, process_tree, spawn
from dynamo_worker.supervisor.spawn import SpawnError

from .conftest import state_of, wait_until

FACTS = """
import json, os, resource, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
facts = {
    "descriptors": [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")],
    "blocked": int(status["SigBlk"], 16),
    "ignored": int(status["SigIgn"], 16),
    "session": os.getsid(0) == os.getpid(),
    "limit": resource.getrlimit(15)[0],
    "environment": dict(os.environ),
}
print(json.dumps(facts))
"""


@pytest.fixture
def keep():
    reading, writing = os.pipe()
    yield reading
    for descriptor in (reading, writing):
        os.close(descriptor)


@pytest.fixture
def output():
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def start(command, keep, output=(0, 0), environment=None):
    """Start a command whose stdout and stderr are the end of a pipe."""
    ends = {1: output[1], 2: output[1]} if output[1] else {}
    return spawn.spawn(command, environment or {}, keep, 2**61 + 7, ends)


def test_what_the_worker_inherits(keep, output):
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    previous = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        process = start([sys.executable, "-S", "-c", FACTS], keep, output, {"ONLY": "this", "LC_ALL": "C.UTF-8"})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGUSR2, previous)
        os.close(leaked)
    os.close(output[1])
    with open(output[0], closefd=False) as file:
        facts = json.loads(file.read())
    assert os.waitpid(process.pid, 0)[1] == 0
    assert set(facts["descriptors"]) == {0, 1, 2, keep}
    assert facts["blocked"] == 0
    assert not facts["ignored"] >> (signal.SIGUSR2 - 1) & 1
    assert facts["session"]
    assert facts["limit"] == 2**61 + 7, "the mark of its tree"
    assert facts["environment"] == {"ONLY": "this", "LC_ALL": "C.UTF-8"}


def test_the_process_is_pinned(keep):
    process = start(["sleep", "60"], keep, environment={"PATH": os.environ["PATH"]})
    try:
        assert process.start > 0
        assert mark.of(process.pid) == 2**61 + 7
    finally:
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)


def test_it_dies_with_its_parent(tmp_path):
    code = """if True:
        import os, sys
        from dynamo_worker.supervisor import spawn
        print(spawn.spawn(["sleep", "60"], dict(os.environ), 1, 2**61, {}).pid, flush=True)
    """
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=30)
    pid = int(done.stdout)
    wait_until(lambda: state_of(pid) in (None, "Z"))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("/nonexistent/x", "No such file or directory"),
        ("/etc/passwd", "Permission denied"),
        ("/etc", "Permission denied"),
    ],
)
def test_a_command_that_cannot_be_executed(keep, command, reason):
    descriptors, children = len(os.listdir("/proc/self/fd")), process_tree.descendants(os.getpid()).keys()
    with pytest.raises(SpawnError, match=f"cannot execute '{command}': {reason}"):
        start([command], keep)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert process_tree.descendants(os.getpid()).keys() <= children, "the child was not reaped"


def test_no_more_processes(keep, monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpawnError, match="cannot fork the worker process: Resource temporarily unavailable"):
        start(["true"], keep)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked, "signals still arrive"
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_no_handler_runs_in_a_forked_child():
    """A handler of ours that ran in both would act twice."""
    reading, writing = os.pipe()
    previous = signal.signal(signal.SIGUSR1, lambda *_: os.write(writing, b"x"))
    try:
        pid = spawn.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0 if signal.SIGUSR1 in signal.sigpending() else 1)
        assert os.waitpid(pid, 0)[1] == 0
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
        os.close(reading)
        os.close(writing)


def test_only_what_is_kept_stays_open():
    pid = spawn.fork()
    if pid == 0:
        kept = os.open("/dev/null", os.O_RDONLY)
        for _ in range(20):
            os.open("/dev/null", os.O_RDONLY)
        spawn.close_descriptors(kept)
        left = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
        os._exit(0 if left <= {0, 1, 2, kept} and kept in left else 1)
    assert os.waitpid(pid, 0)[1] == 0
