"""The exit code and the reason that our caller sees, derived from one record of how the worker ended. No I/O."""

from __future__ import annotations

import signal
from typing import NamedTuple

from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.escalation import KillCause
from dynamo_worker.supervisor.worker_status import ENDING


class Ending(NamedTuple):
    """How a worker ended."""

    #: Of the worker's process; negative: minus the signal that killed it; None: unknown.
    exit_code: int | None
    #: The last state that the worker announced.
    state: State = State.SERVING
    #: The reason that it announced.
    said: str = ""
    #: The exit code that it announced.
    announced_code: int | None = None
    #: Why it could not be started, if it was not.
    spawn_failure: str | None = None
    #: Why the supervisor killed it, if it did.
    kill_cause: KillCause | None = None
    #: Seconds without a heartbeat when it was found unresponsive.
    stuck_for: float = 0.0
    #: How many stop signals came while it ran.
    stop_level: int = 0
    #: The last of them.
    last_signal: int = 0
    #: Whether the guardian ended before the worker did.
    guardian_lost: bool = False
    #: Whether the guardian exited with an error or was killed.
    guardian_failed: bool = False
    #: Whether the worker's process is known to have started.
    started: bool = True
    #: How many processes of our memory cgroup the kernel has killed since the start; None: unknown.
    memory_kills: int | None = None


class Verdict(NamedTuple):
    """The result that the caller of ``dynamo-worker`` sees."""

    code: int
    reason: str


def verdict(ending: Ending) -> Verdict:
    """Return the exit code and the reason. The first rule that applies wins."""
    code, said = ending.exit_code, ending.said
    if ending.spawn_failure is not None:
        return _verdict(ExitCode.START_FAILED, ending.spawn_failure)
    # Our kill shows as SIGKILL, or as no code if the worker could not be reaped. Other codes are its own.
    maybe_killed = code in (None, -signal.SIGKILL)
    cause = ending.kill_cause if maybe_killed else None
    if cause is KillCause.STUCK:
        return _verdict(ExitCode.FATAL, f"event loop unresponsive for {ending.stuck_for:.0f} s")
    if ending.stop_level >= 2:
        name = signal_name(ending.last_signal)
        return _verdict(SIGNAL_BASE + ending.last_signal, f"forced to stop by {name}")
    if cause is KillCause.START:
        return _verdict(ExitCode.STOPPED, "stopped during start")
    if cause is not None and ending.state is State.FATAL:
        return _verdict(ExitCode.FATAL, f"{said or 'fatal error'}; killed at its deadline")
    if cause is not None:
        return _verdict(ExitCode.DEADLINE, f"not stopped by its deadline, killed in state {ending.state}")
    if ending.guardian_lost and maybe_killed:
        if not ending.started and ending.guardian_failed:
            return _verdict(ExitCode.START_FAILED, "the guardian process failed before it could start the worker")
        return _verdict(ExitCode.FATAL, "the guardian process was killed, and the worker with it")
    if code is None:
        return _verdict(SIGNAL_BASE + signal.SIGKILL, "worker is gone, exit status unknown")
    if code < 0:
        return _verdict(SIGNAL_BASE - code, _death_by_signal(-code, ending.memory_kills))
    if code > 0:
        return _verdict(_documented(code, ending), said or f"worker exited with code {code}")
    return _exited_with_0(ending)


def _verdict(code: int, reason: str) -> Verdict:
    return Verdict(int(code), reason)  # Python 3.10 would log an enum by its name


def _exited_with_0(ending: Ending) -> Verdict:
    """Return the verdict on a worker that exited with 0, which does not prove that it succeeded."""
    announced = ending.announced_code
    if ending.stop_level:
        return _verdict(ExitCode.STOPPED, ending.said or f"stopped after {signal_name(ending.last_signal)}")
    if announced == 0 or ending.state in ENDING - {State.FATAL}:
        return _verdict(ExitCode.STOPPED, ending.said or "stopped")
    if announced is not None:
        return _verdict(announced, ending.said or f"worker reported code {announced}")
    unasked = ExitCode.START_FAILED if ending.state is State.STARTING else ExitCode.FATAL
    return _verdict(unasked, f"worker exited in state {ending.state} without being asked to stop")


def _documented(code: int, ending: Ending) -> int:
    """Map the worker's exit code to one of ours.

    A code that the worker did not announce, and that does not stand for a signal, comes from a plugin or a library that
    ended the process.
    """
    if code == ending.announced_code or code - SIGNAL_BASE in signal.valid_signals():
        return code
    if ending.state is not State.STARTING:
        return ExitCode.FATAL
    return code if code == ExitCode.USAGE else ExitCode.START_FAILED


def _death_by_signal(number: int, memory_kills: int | None) -> str:
    reason = f"worker killed by {signal_name(number)}"
    if number != signal.SIGKILL:
        return reason
    if memory_kills is None:
        return f"{reason} (out of memory?)"
    return f"{reason} (out of memory)" if memory_kills > 0 else f"{reason} (not out of memory)"


def signal_name(number: int) -> str:
    """Return a signal's name, such as ``SIGTERM``; real-time signals are called by number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
