"""What to do next, for each kind of end. The runbook says more under the same word."""

from __future__ import annotations

from typing import Final

from dynamo_worker.supervisor.exit_kinds import ExitKind

RUNBOOK: Final = "docs/runbook.md"

_STOPPED: Final = "Nothing: it stopped because it was asked to."

ADVICE: Final = {
    ExitKind.STOPPED: _STOPPED,
    ExitKind.STOPPED_DURING_START: "Nothing: it was stopped before it served. If nobody meant to, does a startup probe "
    "give it too little time?",
    ExitKind.FORCED_STOP: "Find out who sent the second signal. If it was a script or a platform, let it wait for the "
    "termination grace period.",
    ExitKind.DEADLINE_MISSED: "Raise --termination-grace-period (and the platform's), or find out what hung in the "
    "stage named above.",
    ExitKind.EVENT_LOOP_STUCK: "Look for 'Worker event loop is blocked' and the stacks in the log: that call has to "
    "move into a thread.",
    ExitKind.ENGINE_DEAD: "Read the engine's own output just before the end; for SIGKILL look for the OOM killer, for "
    "a GPU error look at dmesg (Xid).",
    ExitKind.ENGINE_STALLED: "The cause says what the engine's processes did. If they were compiling, raise "
    "--stall-timeout-busy; if a GPU hung, drain the node.",
    ExitKind.DISCOVERY_LOST: "Look at the discovery server's log for that time; let the platform restart the worker.",
    ExitKind.UNREACHABLE: "Restore the server that the cause names; let the platform restart the worker.",
    ExitKind.USAGE: "Correct the setting that the cause names. A restart does not help.",
    ExitKind.START_FAILED: "Do what the cause says. A restart does not help if it fails in the same step again.",
    ExitKind.FATAL_ERROR: "Let the platform restart it. If it happens again, look for 'Fatal error' in the log and "
    "report it.",
    ExitKind.FRONTEND_FAILED: "Read the frontend's messages; was it out of memory? Clients of its streams lost their "
    "connections.",
    ExitKind.OUT_OF_MEMORY: "Raise the container's memory limit, or reduce what the engine keeps in host memory.",
    ExitKind.KILLED_BY_SIGNAL: "Find out who sent the signal; for SIGSEGV or SIGABRT, look for a core dump and report "
    "it to the engine.",
    ExitKind.EXITED: "A plugin or a library ended the process: look at its last output, and report it to its author.",
    ExitKind.GUARDIAN_KILLED: "Find out what kills processes on this machine: the guardian has the name dw-guardian.",
    ExitKind.SUPERVISOR_KILLED: "Find out what sent SIGKILL to dynamo-worker itself: the platform, perhaps, at the end "
    "of its own grace period?",
    ExitKind.ALL_KILLED: "Did the machine or the container go down, or was it out of memory? Look at the events of "
    "the node.",
}


def runbook_link(kind: ExitKind) -> str:
    """Return where the runbook explains a kind of end."""
    return f"{RUNBOOK}#{kind.value}"
