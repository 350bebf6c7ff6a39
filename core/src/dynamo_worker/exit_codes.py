"""The exit codes of `dynamo-worker`, for Kubernetes, systemd and people."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit code of the `dynamo-worker` process. A worker killed by signal *n* exits with ``128 + n``."""

    #: Stopped as requested (SIGTERM, SIGINT); every request in flight finished or was handed off.
    STOPPED = 0
    #: The engine, the runtime or the worker itself failed after the start. Restart it.
    FATAL = 1
    #: The command line, the environment or the configuration file is wrong. A restart does not help.
    USAGE = 2
    #: The worker could not start (missing package, no GPU, no memory, port in use …). See the message.
    START_FAILED = 3
    #: A server that the worker needs (etcd, NATS, Kubernetes) cannot be reached. Restart the worker.
    UNREACHABLE = 4
    #: The worker did not stop by its deadline and was killed.
    DEADLINE = 6


#: A process killed by signal *n* has exit code ``128 + n``, as in shells.
SIGNAL_BASE = 128
