"""What the guardian reports, over a real channel."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from dynamo_worker.supervisor import channel
from dynamo_worker.supervisor.channel import Channel
from dynamo_worker.supervisor.guardian_link import GuardianLink
from dynamo_worker.supervisor.linux import Process

from .conftest import state_of, wait_until


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "60"]) as it:
        yield it
        it.kill()


@pytest.fixture
def ends(child):
    """The link, and the guardian's end of it."""
    ours, theirs = channel.pair()
    with ours, theirs:
        yield GuardianLink(child.pid, ours), Channel(theirs)


def test_a_whole_life(ends):
    link, guardian = ends
    assert (link.worker, link.knows_the_end, link.report) == (None, False, None)
    guardian.send("spawned", pid=7, start=8)
    link.receive()
    assert (link.worker, link.knows_the_end) == (Process(7, 8), False)
    guardian.send("exited", code=0)
    link.receive()
    assert (link.worker_exit_code, link.knows_the_end) == (0, True)
    guardian.send("cleaned", report={"processes": 3})
    link.receive()
    assert link.report == {"processes": 3}


def test_no_worker_at_all(ends):
    link, guardian = ends
    guardian.send("spawn_failed", reason="cannot execute 'x'")
    link.receive()
    assert (link.spawn_failure, link.knows_the_end, link.worker) == ("cannot execute 'x'", True, None)


def test_its_last_message_is_received_after_its_death(ends):
    link, guardian = ends
    guardian.send("exited", code=-9)
    guardian.close()
    link.receive()
    assert link.worker_exit_code == -9
    assert link.channel.closed


class TestHangs:
    """Whether looking into processes may be what it hangs in."""

    def test_one_that_runs(self, ends):
        assert ends[0].hangs

    def test_one_that_is_stopped(self, ends, child):
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: state_of(child.pid) == "T")
        assert not ends[0].hangs

    def test_one_that_is_dead(self, ends, child):
        ends[0].kill()
        wait_until(lambda: state_of(child.pid) == "Z")
        assert not ends[0].hangs
        assert child.wait(10) == -signal.SIGKILL
        assert not ends[0].hangs
        ends[0].kill()

    def test_one_that_was_reaped(self, ends):
        """Its pid may be another's."""
        link = GuardianLink(os.getpid(), ends[0].channel.socket)
        assert link.hangs
        link.exit_code = 0
        assert not link.hangs
