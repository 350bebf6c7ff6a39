"""Preloaded processes: children of ``multiprocessing`` that import libraries before the engine spawns them.

An engine starts its processes one after the other, and each spends its first seconds on the same imports. Here the
interpreters start at once, import in parallel, and wait. When the engine spawns a process, a waiting interpreter
becomes it: a child of the same parent with the same file descriptors and environment, running the same code.

If taking over could make a difference, the interpreter executes (``execve``) the spawned command instead, which gives
the same process as without preloading, only later. That is the case if a variable that imported libraries may have read
or a resource limit has changed, if another program is to be executed (one that binds memory first, for example), or if
a descriptor is in use. If no interpreter is waiting, ``multiprocessing`` spawns as usual.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from multiprocessing import spawn, util
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.interpreter import code_arguments

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

log = get_logger(__name__)

#: Identifies a preloaded process by its command line.
MARK: Final = "dynamo_worker.kit.preload"
#: Variables of the worker and the runtime that change during the start and that no engine reads.
_OWN: Final = frozenset(
    {
        *("DYNAMO_WORKER_CONTROL_FD", "DYN_LOG", "DYN_SYSTEM_HOST", "DYN_SYSTEM_PORT", "DYN_FILE_KV"),
        *("DYN_SYSTEM_STARTING_HEALTH_STATUS", "DYN_SELF_HOST_METADATA", "DYN_RUNTIME_NUM_WORKER_THREADS"),
        *("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"),
        *("DYN_EVENT_PLANE_HOST", "DYN_LOGGING_JSONL"),
    }
)
#: How the names of variables begin that are for the runtime's servers.
_OF_SERVERS: Final = ("ETCD_", "NATS_")
#: Seconds after which an unused process exits.
_PATIENCE = 120.0
#: This module moves its descriptors above this number: those passed to a process keep their own numbers.
_HIGH = 200
_LIMITS: Final = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
_spawnv = getattr(util, "spawnv_passfds", None)


@dataclass(frozen=True)
class Level:
    """One generation of processes.

    :param modules: what they import; failures are ignored, because the process itself will report them.
    :param count: number of processes.
    """

    modules: Sequence[str]
    count: int = 1


@dataclass(frozen=True)
class _Waiting:
    pid: int
    connection: socket.socket
    environment: dict[str, str]


_waiting: list[_Waiting] = []


def prepare(
    levels: Sequence[Level],
    harmless: Collection[str],
    *,
    readers: Mapping[str, str] = MappingProxyType({}),
    expected: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Preload the processes that ``multiprocessing`` will spawn.

    :param levels: the processes that this one spawns, those that they spawn, and so on.
    :param harmless: environment variables that may change until then, because nothing reads them on import.
    :param readers: variables that only one module reads on import, with that module: they may change until it is
        imported.
    :param expected: variables that the engine will set unless they are set, with their values; imports see them.
    """
    if not levels or _spawnv is None:
        return
    if util.spawnv_passfds is not _spawn:
        atexit.register(dismiss)
    util.spawnv_passfds = _spawn
    for _ in range(levels[0].count):
        ours, theirs = (_moved(end, _HIGH) for end in socket.socketpair())
        with theirs:
            task = json.dumps([[asdict(level) for level in levels], sorted(harmless), dict(readers)])
            code = f"from {MARK} import main; main({theirs.fileno()}, {task!r})"
            # The flags of this interpreter, as multiprocessing passes them on.
            options: list[str] = util._args_from_interpreter_flags()  # type: ignore[attr-defined] # noqa: SLF001
            path = os.fsencode(spawn.get_executable())
            options = [option for option in options if option != "-P"]
            pid = _spawnv(path, [path, *options, *code_arguments(code)], [theirs.fileno()])
        environment = {**expected, **os.environ}
        _waiting.append(_Waiting(pid, ours, environment))
        # Sent rather than inherited: libraries may have changed the environment without Python's knowledge.
        text = json.dumps(environment).encode()
        with contextlib.suppress(OSError):  # it has died, which shows when it is used
            ours.sendall(len(text).to_bytes(8, "big") + text)


def _moved(end: socket.socket, least: int) -> socket.socket:
    """Return the same socket with a descriptor of at least ``least``."""
    with end:
        return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, least))


def dismiss() -> None:
    """End the processes that were not used."""
    while _waiting:
        one = _waiting.pop()
        one.connection.close()
        with contextlib.suppress(OSError):
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)


def _spawn(path: Any, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """Replace ``multiprocessing.util.spawnv_passfds``: return the pid of a process that runs ``args``."""
    assert _spawnv is not None
    if args[-1:] == ["--multiprocessing-fork"]:
        numbers = sorted({*map(int, passfds), 0, 1, 2})
        task = {
            "path": os.fsdecode(path),
            "args": [os.fsdecode(argument) for argument in args],
            "descriptors": numbers,
            "environment": dict(os.environ),
            "changed": [],
            "directory": os.getcwd(),
            "limits": [[number, resource.getrlimit(number)] for number in _LIMITS],
        }
        while _waiting:
            one = _waiting.pop(0)
            task["changed"] = _changed(one.environment)
            with one.connection, contextlib.suppress(OSError):
                # Descriptors travel with the first byte.
                socket.send_fds(one.connection, [b"\0"], numbers)
                one.connection.sendall(json.dumps(task).encode())
                return one.pid
    pid: int = _spawnv(path, args, passfds)
    return pid


def _changed(environment: dict[str, str]) -> list[str]:
    """Return the names of the variables that have changed."""
    names = environment.keys() | os.environ.keys()
    return sorted(name for name in names if environment.get(name) != os.environ.get(name))


# ------------------------------------------------------------------------------------------ the process that waits


def main(connection: int, task: str) -> None:
    """Import the modules, wait, and become the process that the engine spawns."""
    levels, harmless, readers = json.loads(task)
    # It sets process titles, and finds the memory for them only while the environment is where the kernel put it.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()
    channel = socket.socket(fileno=connection)
    length = int.from_bytes(_received(channel, 8), "big")
    os.environ.clear()
    os.environ.update(json.loads(_received(channel, length)))
    # The processes below this one can be preloaded in parallel.
    prepare([Level(**level) for level in levels[1:]], harmless, readers=readers)
    for module in levels[0]["modules"]:
        with contextlib.suppress(Exception):  # the process itself will report it
            importlib.import_module(module)
    with channel:
        if not select.select([channel], [], [], _PATIENCE)[0]:
            os._exit(0)
        try:
            first, descriptors, _, _ = socket.recv_fds(channel, 1, 253)
            order = b"".join(iter(lambda: channel.recv(1 << 16), b""))
        except OSError:
            first = b""
    if not first:
        os._exit(0)  # the parent is gone or does not need this process
    unread = {name for name, reader in readers.items() if reader not in sys.modules}
    _become(json.loads(order), descriptors, unread | set(harmless))


def _is_of_the_runtime(name: str) -> bool:
    return name in _OWN or name.startswith(_OF_SERVERS)


def _received(channel: socket.socket, length: int) -> bytes:
    """Return that many bytes; exit if the parent is gone."""
    data = b""
    while len(data) < length:
        part = channel.recv(length - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _become(order: dict[str, Any], descriptors: Sequence[int], harmless: Collection[str]) -> None:
    environment: dict[str, str] = order["environment"]
    numbers: list[int] = order["descriptors"]
    # Move them above the numbers that they will get.
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    in_the_way = [number for number in numbers if number > 2 and _is_open(number)]
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order["directory"])
    # A variable that the imports of this process have set to the same value has not changed.
    obstacles = [
        name
        for name in order["changed"]
        if not (name in harmless or _is_of_the_runtime(name)) and os.environ.get(name) != environment.get(name)
    ]
    # Some limits, such as that of the stack, only take effect when a program is loaded.
    limits = [(number, tuple(limit)) for number, limit in order["limits"]]
    limits = [(number, limit) for number, limit in limits if resource.getrlimit(number) != limit]
    for number, limit in limits:
        resource.setrlimit(number, limit)
    other_program = order["path"] != sys.executable
    if obstacles or in_the_way or limits or other_program:
        log.debug(
            "Preloaded process starts over",
            changed=",".join(obstacles),
            descriptors=len(in_the_way),
            limits=len(limits),
            other_program=other_program,
        )
        os.execve(order["path"], order["args"], environment)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # determined again from the environment
    args: list[str] = order["args"]
    at = args.index("-c")
    sys.argv = ["-c", *args[at + 2 :]]
    exec(args[at + 1], {"__name__": "__main__"})  # noqa: S102 - as the interpreter does with `-c`
