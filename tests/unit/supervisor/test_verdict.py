"""Every way in which a worker can end, and what its caller learns: exit code and reason."""

from __future__ import annotations

import signal

import pytest

from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.escalation import KillCause
from dynamo_worker.supervisor.verdict import Ending, signal_name, verdict

KILLED = -signal.SIGKILL
TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)

#: Ending, exit code, reason.
TABLE = {
    # It was never started.
    "spawn failure": (Ending(None, spawn_failure="cannot execute 'x'", started=False), 3, "cannot execute 'x'"),
    "spawn failure, forced": (
        Ending(None, spawn_failure="no processes", started=False, stop_level=2, last_signal=TERM),
        3,
        "no processes",
    ),
    # The supervisor killed it: the code is the kernel's, or nobody could learn it.
    "stuck": (Ending(KILLED, kill_cause=KillCause.STUCK, stuck_for=18.4), 1, "event loop unresponsive for 18 s"),
    "stuck, code unknown": (
        Ending(None, kill_cause=KillCause.STUCK, stuck_for=5),
        1,
        "event loop unresponsive for 5 s",
    ),
    "stuck, then forced to hurry": (
        Ending(KILLED, kill_cause=KillCause.STUCK, stuck_for=5, stop_level=2, last_signal=INT),
        1,
        "event loop unresponsive for 5 s",
    ),
    "stuck, but it ended by itself in time": (
        Ending(7, kill_cause=KillCause.STUCK, announced_code=7, said="port lost"),
        7,
        "port lost",
    ),
    "forced": (
        Ending(KILLED, kill_cause=KillCause.FORCED, stop_level=2, last_signal=INT),
        130,
        "forced to stop by SIGINT",
    ),
    "forced, obeyed": (Ending(0, stop_level=2, last_signal=TERM), 143, "forced to stop by SIGTERM"),
    "forced, code of its own": (Ending(9, stop_level=3, last_signal=INT), 130, "forced to stop by SIGINT"),
    "forced while the kernel does not end it": (
        Ending(None, kill_cause=KillCause.DEADLINE, stop_level=2, last_signal=TERM),
        143,
        "forced to stop by SIGTERM",
    ),
    "stopped during start": (
        Ending(KILLED, State.STARTING, kill_cause=KillCause.START, stop_level=1, last_signal=TERM),
        0,
        "stopped during start",
    ),
    "fatal, hung": (
        Ending(KILLED, State.FATAL, said="engine died", kill_cause=KillCause.DEADLINE),
        1,
        "engine died; killed at its deadline",
    ),
    "fatal, hung, gave no reason": (
        Ending(KILLED, State.FATAL, kill_cause=KillCause.DEADLINE),
        1,
        "fatal error; killed at its deadline",
    ),
    "deadline": (
        Ending(KILLED, State.DRAINING, kill_cause=KillCause.DEADLINE, stop_level=1, last_signal=TERM),
        6,
        "not stopped by its deadline, killed in state DRAINING",
    ),
    "deadline, survives": (
        Ending(None, State.SERVING, kill_cause=KillCause.DEADLINE, stop_level=1, last_signal=TERM),
        6,
        "not stopped by its deadline, killed in state SERVING",
    ),
    "obeyed a moment before the kill": (
        Ending(0, State.DRAINING, kill_cause=KillCause.DEADLINE, stop_level=1, last_signal=TERM),
        0,
        "stopped after SIGTERM",
    ),
    # The guardian ended first.
    "guardian killed": (
        Ending(KILLED, guardian_lost=True),
        1,
        "the guardian process was killed, and the worker with it",
    ),
    "guardian killed, code unknown": (
        Ending(None, guardian_lost=True),
        1,
        "the guardian process was killed, and the worker with it",
    ),
    "guardian failed at its start": (
        Ending(None, State.STARTING, guardian_lost=True, guardian_failed=True, started=False),
        3,
        "the guardian process failed before it could start the worker",
    ),
    "guardian ended at its start, without an error": (
        Ending(None, State.STARTING, guardian_lost=True, started=False),
        1,
        "the guardian process was killed, and the worker with it",
    ),
    "guardian killed after the worker failed": (
        Ending(3, guardian_lost=True, announced_code=3, said="no GPU"),
        3,
        "no GPU",
    ),
    # Nobody saw how.
    "unknown": (Ending(None), 137, "worker is gone, exit status unknown"),
    # A signal from elsewhere.
    "out of memory": (Ending(KILLED, memory_kills=1), 137, "worker killed by SIGKILL (out of memory)"),
    "not out of memory": (Ending(KILLED, memory_kills=0), 137, "worker killed by SIGKILL (not out of memory)"),
    "out of memory?": (Ending(KILLED, memory_kills=None), 137, "worker killed by SIGKILL (out of memory?)"),
    "crash": (Ending(-signal.SIGSEGV, memory_kills=1), 139, "worker killed by SIGSEGV"),
    "real-time signal": (Ending(-40), 168, "worker killed by signal 40"),
    "killed by a signal while it stops": (
        Ending(-signal.SIGTERM, stop_level=1, last_signal=TERM),
        143,
        "worker killed by SIGTERM",
    ),
    # A code of its own.
    "announced code": (Ending(4, announced_code=4, said="no disk"), 4, "no disk"),
    "announced code, no reason": (Ending(4, announced_code=4), 4, "worker exited with code 4"),
    "code of a plugin while serving": (Ending(7), 1, "worker exited with code 7"),
    "code of a plugin, another one was announced": (Ending(7, announced_code=4, said="x"), 1, "x"),
    "code of a plugin during the start": (Ending(7, State.STARTING), 3, "worker exited with code 7"),
    "usage error": (Ending(2, State.STARTING), 2, "worker exited with code 2"),
    "code 2 while serving": (Ending(2), 1, "worker exited with code 2"),
    "a code that means a signal": (Ending(143), 143, "worker exited with code 143"),
    "a code beyond all signals": (Ending(250), 1, "worker exited with code 250"),
    "failed while it stops": (
        Ending(1, State.DRAINING, announced_code=1, said="engine died", stop_level=1, last_signal=TERM),
        1,
        "engine died",
    ),
    # Success.
    "stopped": (Ending(0, State.STOPPED, stop_level=1, last_signal=TERM), 0, "stopped after SIGTERM"),
    "stopped, gave a reason": (
        Ending(0, said="stopped by SIGTERM", stop_level=1, last_signal=TERM),
        0,
        "stopped by SIGTERM",
    ),
    "announced its end": (Ending(0, announced_code=0), 0, "stopped"),
    "announced its end with a reason": (Ending(0, announced_code=0, said="maintenance"), 0, "maintenance"),
    **{
        f"stopped in {state}, told by somebody else": (Ending(0, state), 0, "stopped")
        for state in (State.UNREGISTERING, State.GRACE, State.DRAINING, State.CLEANUP)
    },
    "success in spite of a failure": (Ending(0, announced_code=1, said="engine died"), 1, "engine died"),
    "success in spite of a failure without a reason": (Ending(0, announced_code=3), 3, "worker reported code 3"),
    "success in spite of a fatal error": (
        Ending(0, State.FATAL),
        1,
        "worker exited in state FATAL without being asked to stop",
    ),
    "ended unasked while serving": (
        Ending(0, State.SERVING),
        1,
        "worker exited in state SERVING without being asked to stop",
    ),
    "ended unasked during the start": (
        Ending(0, State.STARTING),
        3,
        "worker exited in state STARTING without being asked to stop",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    ending, code, reason = TABLE[name]
    assert verdict(ending)[:2] == (code, reason)


@pytest.mark.parametrize("name", TABLE)
def test_the_code_is_a_plain_number(name):
    """Python 3.10 formats an enum by its name."""
    assert type(verdict(TABLE[name][0]).code) is int


def test_every_documented_code_occurs():
    assert {code for _, code, _ in TABLE.values()} >= set(ExitCode)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_names(number):
    assert signal_name(number) == number.name
