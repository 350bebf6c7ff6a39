"""The kinds of ends that a worker can have: one word for each, for records, metrics and the runbook."""

from __future__ import annotations

import enum


class ExitKind(str, enum.Enum):
    """Why a worker ended. The value is also the anchor of its section in the runbook."""

    #: It stopped because it was asked to.
    STOPPED = "stopped"
    #: It was asked to stop while it started.
    STOPPED_DURING_START = "stopped-during-start"
    #: A second or third signal ended it.
    FORCED_STOP = "forced-stop"
    #: It did not stop by its deadline and was killed.
    DEADLINE_MISSED = "deadline-missed"
    #: Its event loop was blocked until the heartbeat timeout.
    EVENT_LOOP_STUCK = "event-loop-stuck"
    #: A process of the engine died, or the engine said that it is dead.
    ENGINE_DEAD = "engine-dead"
    #: The engine lives and does not answer.
    ENGINE_STALLED = "engine-stalled"
    #: Its registration was lost and could not be restored.
    DISCOVERY_LOST = "discovery-lost"
    #: A server that it needs cannot be reached.
    UNREACHABLE = "unreachable"
    #: The command line, the environment or the configuration file is wrong.
    USAGE = "usage"
    #: It could not start.
    START_FAILED = "start-failed"
    #: Any other error after the start.
    FATAL_ERROR = "fatal-error"
    #: The frontend beside it failed.
    FRONTEND_FAILED = "frontend-failed"
    #: The kernel killed it for lack of memory.
    OUT_OF_MEMORY = "out-of-memory"
    #: A signal killed it that its supervisor did not send.
    KILLED_BY_SIGNAL = "killed-by-signal"
    #: It exited although nobody had asked it to.
    EXITED = "exited"
    #: The guardian was killed, and the worker with it.
    GUARDIAN_KILLED = "guardian-killed"
    #: The supervisor was killed; the guardian ended the worker.
    SUPERVISOR_KILLED = "supervisor-killed"
    #: Supervisor and guardian were killed at once, or the machine went down.
    ALL_KILLED = "all-killed"

    def __str__(self) -> str:
        return self.value


#: The kinds by the name of the error that a worker announces; others follow from the exit code.
_OF_ERRORS = {
    "EngineDeadError": ExitKind.ENGINE_DEAD,
    "EngineStalledError": ExitKind.ENGINE_STALLED,
    "DiscoveryLostError": ExitKind.DISCOVERY_LOST,
}
_OF_CODES = {
    0: ExitKind.STOPPED,
    1: ExitKind.FATAL_ERROR,
    2: ExitKind.USAGE,
    3: ExitKind.START_FAILED,
    4: ExitKind.UNREACHABLE,
    6: ExitKind.DEADLINE_MISSED,
}


def kind_of_error(name: str, code: int) -> ExitKind:
    """Return the kind of an end that a worker has announced.

    :param name: of the error's class; empty without one.
    :param code: the exit code.
    """
    if name in _OF_ERRORS:
        return _OF_ERRORS[name]
    return _OF_CODES.get(code, ExitKind.FORCED_STOP if code > 128 else ExitKind.FATAL_ERROR)
