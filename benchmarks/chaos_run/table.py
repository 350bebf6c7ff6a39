"""The table of faults: what each hits, how its worker must end, and how long that may take. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode

#: Settings of every worker of the fleet, in seconds.
TERMINATION, GRACE = 20.0, 0.5
HEARTBEAT, STALL = 6.0, 6.0
HEALTH_INTERVAL, HEALTH_TIMEOUT = 0.5, 3.0
CLEANUP_TIMEOUT = 3.0
#: Seconds that a stop may take: the termination grace period, and the time to notice that it is over.
_STOP: Final = TERMINATION + 0.5
#: Seconds from the answer that never comes to the end of the worker, beside the time limit itself.
_NOTICE: Final = 2.0

_STOPPED, _FATAL, _DEADLINE = int(ExitCode.STOPPED), int(ExitCode.FATAL), int(ExitCode.DEADLINE)
_KILLED: Final = SIGNAL_BASE + 9

WORKER, FRONTEND, SERVER = "worker", "frontend", "server"


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    :param name: what the tables and the log call it; also the name of the act that commits it.
    :param codes: exit codes of the process that it hits; empty: it must go on.
    :param reason: regular expression for the reason in the last line of its log.
    :param bound: seconds from the fault to the exit, or until a process that goes on serves again.
    :param hits: a worker, a frontend, or a server that all share.
    :param processes: whether it needs an engine with processes of its own.
    :param drains: whether the worker's requests end there or move, as in any stop: then even a request that cannot
        move must be completed.
    :param needs: what the machine must be able to: ``tmp`` (mount), ``pids`` (a cgroup), ``nats`` (its server).
    :param weight: how often it is in a deck.
    """

    name: str
    codes: frozenset[int] = frozenset()
    reason: str = ""
    bound: float = 5.0
    hits: str = WORKER
    processes: bool = False
    drains: bool = False
    needs: str = ""
    weight: int = 1


def _ends(name: str, code: int | tuple[int, ...], reason: str, bound: float, **more: object) -> Row:
    codes = frozenset((code,) if isinstance(code, int) else code)
    return Row(name, codes, reason, bound, **more)  # type: ignore[arg-type]


#: Every fault. ``{signal}`` in a reason stands for the name of the signal that was drawn.
TABLE: Final = (
    # --- Processes that die or stand still
    _ends("worker killed", _KILLED, "worker killed by SIGKILL", 1.0, weight=3),
    _ends("worker crashes", (SIGNAL_BASE + 11, SIGNAL_BASE + 6), "worker killed by {signal}", 2.0),
    _ends("worker stands still", _FATAL, "event loop unresponsive", HEARTBEAT + _NOTICE + 1.0),
    Row("worker pauses"),
    _ends("supervisor killed", _KILLED, "the guardian, without a supervisor", 1.0, weight=2),
    Row("supervisor pauses"),
    _ends("guardian killed", _FATAL, "the guardian process was killed", 1.0),
    _ends("guardian stands still at a stop", _STOPPED, "stopped by SIGTERM", _STOP, drains=True),
    _ends("supervisor and guardian killed", _KILLED, "", 1.0),
    _ends("engine process killed", _FATAL, "engine process .* died", 1.0, processes=True, weight=2),
    _ends("engine process stands still", _FATAL, "made no progress", STALL + _NOTICE, processes=True),
    # --- What an engine's author gets wrong
    _ends("health check fails", _FATAL, "chaos: an illegal memory access", HEALTH_INTERVAL + 1.0),
    _ends("health check hangs", _FATAL, "did not answer within", HEALTH_INTERVAL + HEALTH_TIMEOUT + _NOTICE),
    Row("health check is broken"),
    _ends("event loop blocked", _FATAL, "event loop unresponsive", HEALTH_INTERVAL + HEARTBEAT + _NOTICE + 1.0),
    Row("event loop blocked for a moment"),
    _ends("interpreter lock held", _FATAL, "event loop unresponsive", HEALTH_INTERVAL + HEARTBEAT + _NOTICE + 1.0),
    _ends("drain hook raises", _STOPPED, "stopped by SIGTERM", _STOP, drains=True),
    _ends("drain hook hangs", _STOPPED, "stopped by SIGTERM", _STOP, drains=True),
    _ends("cleanup hook raises", _STOPPED, "stopped by SIGTERM", _STOP, drains=True),
    _ends("cleanup hook hangs", _STOPPED, "stopped by SIGTERM", _STOP, drains=True),
    _ends("cleanup hook blocks the loop", _DEADLINE, "not stopped by its deadline", _STOP, drains=True),
    # --- Stops
    _ends("stop", _STOPPED, "stopped by {signal}", _STOP, drains=True, weight=3),
    _ends("stop of the worker's own process", _STOPPED, "stopped by {signal}", _STOP, drains=True),
    Row("guardian gets a signal"),
    _ends("SIGQUIT", SIGNAL_BASE + 3, "forced to stop by SIGQUIT", 2.5),
    _ends("second signal", SIGNAL_BASE + 15, "forced to stop by SIGTERM", 2.5),
    _ends("third signal", SIGNAL_BASE + 15, "forced to stop by SIGTERM", 1.0),
    _ends("worker killed while draining", _KILLED, "worker killed by SIGKILL", 1.0),
    _ends("supervisor killed while draining", _KILLED, "the guardian, without a supervisor", 1.0),
    _ends("engine process killed while draining", _FATAL, "engine process .* died", 1.0, processes=True),
    # --- Starts: of one more worker, beside the others
    _ends("stopped during the start", _STOPPED, "stopped", 3.0, drains=True),
    _ends("worker killed during the start", _KILLED, "worker killed by SIGKILL", 1.0),
    _ends("supervisor killed during the start", _KILLED, "the guardian, without a supervisor", 1.0),
    _ends("guardian killed during the start", _FATAL, "the guardian process was killed", 1.0),
    # --- Resources
    _ends("disk full, then a stop", _STOPPED, "stopped by SIGTERM", _STOP, drains=True, needs="tmp"),
    _ends("disk full, then killed", _KILLED, "worker killed by SIGKILL", 1.0, needs="tmp"),
    _ends("no more processes, then a stop", _STOPPED, "stopped by SIGTERM", _STOP, drains=True, needs="pids"),
    _ends("no more processes, then killed", _KILLED, "worker killed by SIGKILL", 3.0, needs="pids"),
    # --- Operators
    Row("drained and resumed", bound=_STOP, drains=True, weight=2),
    _ends("rolling upgrade", _STOPPED, "stopped by SIGTERM", _STOP, drains=True, weight=2),
    # --- Discovery and servers
    Row("registration lost", bound=8.0, drains=True),
    Row("etcd killed", bound=10.0, hits=SERVER),
    Row("etcd stopped", bound=10.0, hits=SERVER),
    Row("etcd emptied", bound=10.0, hits=SERVER),
    Row("NATS killed", bound=10.0, hits=SERVER, needs="nats"),
    Row("NATS stopped", bound=10.0, hits=SERVER, needs="nats"),
    # --- Frontends
    _ends("frontend killed", _KILLED, "", 1.0, hits=FRONTEND),
    _ends("frontend stopped by SIGTERM", _STOPPED, "", _STOP, hits=FRONTEND),
    _ends("frontend gets a second signal", _STOPPED, "", 1.0, hits=FRONTEND),
    Row("frontend pauses", hits=FRONTEND),
)

BY_NAME: Final = {row.name: row for row in TABLE}
