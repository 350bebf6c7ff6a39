"""The exit code and the reason that our caller sees, derived from one record of how the worker ended. No I/O."""

from __future__ import annotations

import signal
from typing import NamedTuple

from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.escalation import KillCause
from dynamo_worker.supervisor.exit_kinds import ExitKind, kind_of_error
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
    #: The name of the error that it announced; empty without one.
    error: str = ""
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
    #: Whether it never served.
    never_served: bool = False
    #: How many processes of our memory cgroup the kernel has killed since the start; None: unknown.
    memory_kills: int | None = None


class Verdict(NamedTuple):
    """The result that the caller of ``dynamo-worker`` sees."""

    code: int
    reason: str
    kind: ExitKind


def verdict(ending: Ending) -> Verdict:
    """Return the exit code and the reason. The first rule that applies wins."""
    code, said = ending.exit_code, ending.said
    if ending.spawn_failure is not None:
        return _verdict(ExitCode.START_FAILED, ending.spawn_failure, ExitKind.START_FAILED)
    # Our kill shows as SIGKILL, or as no code if the worker could not be reaped. Other codes are its own.
    maybe_killed = code in (None, -signal.SIGKILL)
    cause = ending.kill_cause if maybe_killed else None
    if cause is KillCause.STUCK:
        return _verdict(
            ExitCode.FATAL, f"event loop unresponsive for {ending.stuck_for:.0f} s", ExitKind.EVENT_LOOP_STUCK
        )
    if ending.stop_level >= 2:
        name = signal_name(ending.last_signal)
        return _verdict(SIGNAL_BASE + ending.last_signal, f"forced to stop by {name}", ExitKind.FORCED_STOP)
    if cause is KillCause.START:
        return _verdict(ExitCode.STOPPED, "stopped during start", ExitKind.STOPPED_DURING_START)
    if cause is not None and ending.state is State.FATAL:
        kind = kind_of_error(ending.error, ExitCode.FATAL)
        return _verdict(ExitCode.FATAL, f"{said or 'fatal error'}; killed at its deadline", kind)
    if cause is not None:
        reason = f"not stopped by its deadline, killed in state {ending.state}"
        return _verdict(ExitCode.DEADLINE, reason, ExitKind.DEADLINE_MISSED)
    if ending.guardian_lost and maybe_killed:
        if not ending.started and ending.guardian_failed:
            reason = "the guardian process failed before it could start the worker"
            return _verdict(ExitCode.START_FAILED, reason, ExitKind.GUARDIAN_KILLED)
        reason = "the guardian process was killed, and the worker with it"
        return _verdict(ExitCode.FATAL, reason, ExitKind.GUARDIAN_KILLED)
    if code is None:
        return _verdict(SIGNAL_BASE + signal.SIGKILL, "worker is gone, exit status unknown", ExitKind.KILLED_BY_SIGNAL)
    if code < 0:
        killed = code == -signal.SIGKILL and ending.memory_kills is not None and ending.memory_kills > 0
        kind = ExitKind.OUT_OF_MEMORY if killed else ExitKind.KILLED_BY_SIGNAL
        return _verdict(SIGNAL_BASE - code, _death_by_signal(-code, ending.memory_kills), kind)
    if code > 0:
        documented = _documented(code, ending)
        announced = code == ending.announced_code
        kind = kind_of_error(ending.error, documented) if announced or said else ExitKind.EXITED
        return _verdict(documented, said or f"worker exited with code {code}", kind)
    return _exited_with_0(ending)


def _verdict(code: int, reason: str, kind: ExitKind) -> Verdict:
    return Verdict(int(code), reason, kind)  # Python 3.10 would log an enum by its name


def _exited_with_0(ending: Ending) -> Verdict:
    """Return the verdict on a worker that exited with 0, which does not prove that it succeeded."""
    announced = ending.announced_code
    if ending.stop_level:
        reason = ending.said or f"stopped after {signal_name(ending.last_signal)}"
        started = not ending.never_served
        return _verdict(ExitCode.STOPPED, reason, ExitKind.STOPPED if started else ExitKind.STOPPED_DURING_START)
    if announced == 0 or ending.state in ENDING - {State.FATAL}:
        return _verdict(ExitCode.STOPPED, ending.said or "stopped", ExitKind.STOPPED)
    if announced is not None:
        reason = ending.said or f"worker reported code {announced}"
        return _verdict(announced, reason, kind_of_error(ending.error, announced))
    unasked = ExitCode.START_FAILED if ending.state is State.STARTING else ExitCode.FATAL
    reason = f"worker exited in state {ending.state} without being asked to stop"
    return _verdict(unasked, reason, ExitKind.EXITED)


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
