"""The exit codes of `dynamo-worker`: what Kubernetes, systemd and people learn from how a worker ended."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit code of the `dynamo-worker` process. A worker killed by signal *n* exits with ``128 + n``."""

    #: A stop was asked for (SIGTERM, SIGINT) and carried out; every request in flight finished or was handed off.
    STOPPED = 0
    #: The engine, the runtime or the worker itself failed after it had started. A restart is the right answer.
    FATAL = 1
    #: The command line, the environment or the configuration file is wrong. A restart will not help.
    USAGE = 2
    #: The worker could not start (missing package, no GPU, no memory, port in use …). See the message first.
    START_FAILED = 3
    #: The shutdown did not end by its deadline and the worker was killed.
    DEADLINE = 6


#: Base of the codes of processes that died by a signal: ``128 + signal number``, as shells report it.
SIGNAL_BASE = 128
