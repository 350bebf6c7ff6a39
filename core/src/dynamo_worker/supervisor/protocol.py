"""Names and time limits that supervisor, guardian and worker share. The worker reads it, too."""

from __future__ import annotations

import signal

#: Environment variable: the descriptor of the worker's control socket.
CONTROL_FD = "DYNAMO_WORKER_CONTROL_FD"
#: Environment variable: the worker's private directory, which the supervisor removes. It also identifies descendants of
#: the worker.
RUN_DIR = "DYNAMO_WORKER_RUN_DIR"
#: Where Dynamo's ``file`` discovery backend keeps its files unless ``DYN_FILE_KV`` is set.
DEFAULT_FILE_KV = "/tmp/dynamo_store_kv"  # noqa: S108 - Dynamo's choice
#: Has the worker's main thread write its stack into a pipe. Engines have uses of their own for the named signals.
STACK_SIGNAL = signal.SIGRTMIN + 5
#: Message with the end of that pipe.
STACK = "stack"
#: Message with the status server's listening socket and the socket that leads to the worker.
STATUS_SERVER = "status_server"
#: Seconds at the end of the termination grace period that are reserved for the supervisor: kill, reap, clean up.
KILL_RESERVE = 2.0
#: Seconds the kernel may take to end a worker that was killed. One that hangs in a driver does not end at all.
DEATH_LIMIT = 5.0
#: Seconds for everything after a second signal.
FORCED_STOP = 2.0
#: Seconds within which signals count as one: a terminal signals a whole group, systemd sends SIGTERM and SIGHUP. Only
#: SIGQUIT still counts, because it asks for something else.
SIGNAL_DEBOUNCE = 0.1
