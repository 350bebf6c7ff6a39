"""The frontend beside the worker outlives it while it carries streams, whoever dies first, and never for too long."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from dynamo_worker.supervisor.protocol import SIGNAL_DEBOUNCE

from .conftest import state_of, wait_until

GRACE = 'settings={"termination_grace_period":%s}'
SERVING = "state=SERVING"


def frontend_of(supervised):
    (pid,) = [pid for pid in supervised.tree() if b"frontend.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def start(supervised, *steps, grace=20, allowed=60, then="obey=0"):
    """Start a worker with a frontend whose streams last until `done`."""
    supervised.start(GRACE % grace, f"frontend={done(supervised)}:{allowed}", *steps, SERVING, "arrived", then)
    return frontend_of(supervised)


def done(supervised):
    return supervised.base / "done"


def kill_worker(supervised):
    os.kill(supervised.worker, signal.SIGKILL)
    return 137


def kill_supervisor(supervised):
    supervised.signal(signal.SIGKILL)
    return -signal.SIGKILL


def kill_guardian(supervised):
    os.kill(supervised.guardian, signal.SIGKILL)
    return 1


def stop_gracefully(supervised):
    supervised.signal(signal.SIGTERM)
    return 0


def lives(pid):
    return state_of(pid) not in (None, "Z")


def names(supervised):
    found = []
    for pid in supervised.tree():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode())
    return found


@pytest.mark.parametrize("end", [kill_worker, kill_supervisor, kill_guardian, stop_gracefully])
def test_everything_else_is_gone_at_once_and_the_frontend_when_its_streams_are_done(supervised, end):
    frontend = start(supervised, "child=stubborn.py", "temp")
    worker = supervised.worker
    code = end(supervised)
    wait_until(lambda: state_of(worker) is None, what="the worker is gone")
    wait_until(lambda: not any("children/stubborn" in name for name in names(supervised)), what="its children are gone")
    wait_until(lambda: "Frontend is finishing its streams" in supervised.text)
    assert lives(frontend), supervised.text
    assert supervised.run_directories, "its files stay with it"
    done(supervised).touch()
    assert supervised.wait() == code
    supervised.gone()
    assert "open streams at its deadline" not in supervised.text


def test_one_without_streams_delays_nothing(supervised, measured):
    done(supervised).touch()
    start(supervised)
    since = time.monotonic()
    supervised.signal(signal.SIGTERM)
    assert supervised.wait() == 0
    measured("SIGTERM with an idle frontend: exit", time.monotonic() - since, 0.5)


@pytest.mark.parametrize("end", [kill_worker, stop_gracefully])
def test_its_time_ends_with_the_termination_grace_period(supervised, end):
    start(supervised, grace=3)
    since = time.monotonic()
    code = end(supervised)
    assert supervised.wait() == code
    assert 1.0 < time.monotonic() - since < 3.5
    assert "open streams at its deadline" in supervised.text
    supervised.gone()


def test_it_gets_no_more_than_the_worker_has_left_for_it(supervised):
    """What `--drain abort` says, also when nobody is left who knows the settings."""
    start(supervised, allowed=0.7)
    since = time.monotonic()
    supervised.signal(signal.SIGKILL)
    supervised.gone()
    assert 0.6 < time.monotonic() - since < 10


def test_a_second_signal_leaves_at_once(supervised):
    start(supervised)
    supervised.signal(signal.SIGTERM)
    wait_until(lambda: "is finishing its streams" in supervised.text)
    supervised.signal(signal.SIGTERM)
    assert supervised.wait(5) == 0
    supervised.gone()


def test_a_first_signal_cuts_nothing_after_a_crash(supervised):
    frontend = start(supervised)
    kill_worker(supervised)
    wait_until(lambda: "is finishing its streams" in supervised.text)
    supervised.signal(signal.SIGTERM)
    wait_until(lambda: "another one leaves at once" in supervised.text)
    assert lives(frontend)
    done(supervised).touch()
    assert supervised.wait() == 137
    assert "open streams at its deadline" not in supervised.text


def test_a_forced_stop_has_its_two_seconds_for_the_frontend_too(supervised):
    start(supervised, grace=30, then="hang")
    supervised.signal(signal.SIGTERM)
    wait_until(lambda: "stop_level=1" in supervised.text)
    time.sleep(1.5 * SIGNAL_DEBOUNCE)  # else both count as one
    supervised.signal(signal.SIGINT)
    assert supervised.wait(8) == 130
    supervised.gone()


@pytest.mark.parametrize("victim", ["guardian", "supervisor"])
def test_the_process_that_waits_for_it_may_die(supervised, victim):
    frontend = start(supervised)
    guardian = supervised.guardian
    kill_worker(supervised)
    wait_until(lambda: "is finishing its streams" in supervised.text)
    os.kill(guardian if victim == "guardian" else supervised.pid, signal.SIGKILL)
    if victim == "guardian":
        wait_until(lambda: "Guardian died" in supervised.text)
    else:
        assert supervised.wait() == -signal.SIGKILL
    assert lives(frontend)
    done(supervised).touch()
    assert supervised.wait() == (137 if victim == "guardian" else -signal.SIGKILL)
    supervised.gone()
    assert "open streams at its deadline" not in supervised.text


@pytest.mark.parametrize("waiting", ["guardian", "supervisor"])
def test_one_that_is_killed_with_its_streams_is_a_failure(supervised, waiting):
    supervised.termination_message.touch()
    frontend = start(supervised)
    guardian = supervised.guardian
    supervised.signal(signal.SIGTERM)
    wait_until(lambda: "is finishing its streams" in supervised.text)
    if waiting == "supervisor":
        os.kill(guardian, signal.SIGKILL)
        wait_until(lambda: supervised.text.count("is finishing its streams") == 2)
    os.kill(frontend, signal.SIGKILL)
    assert supervised.wait() == 1
    assert f"WARNING dynamo_worker.{waiting}: The frontend ended before its streams did" in supervised.text
    assert supervised.reason == "exit code 1: the frontend ended before its streams did: killed by signal 9"


def test_the_cause_of_an_end_is_what_came_first(supervised):
    frontend = start(supervised)
    kill_worker(supervised)
    wait_until(lambda: "is finishing its streams" in supervised.text)
    os.kill(frontend, signal.SIGKILL)
    assert supervised.wait() == 137
    assert "The frontend ended before its streams did" in supervised.text


def test_a_stopped_frontend_continues_and_ends(supervised):
    frontend = start(supervised)
    done(supervised).touch()
    os.kill(frontend, signal.SIGSTOP)
    wait_until(lambda: state_of(frontend) == "T")
    kill_worker(supervised)
    assert supervised.wait(10) == 137


def test_a_start_does_not_wait_for_what_an_earlier_one_has_left(supervised):
    """Both owners were killed: the next worker wants the frontend's port."""
    frontend = start(supervised)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (supervised.guardian, supervised.pid):
            os.kill(pid, number)
    supervised.wait()
    assert lives(frontend)
    supervised.start(SERVING, "arrived", "obey=0")
    wait_until(lambda: not lives(frontend), 10, "swept")
