"""Processes that stand by: children of ``multiprocessing`` that have done their imports before they are needed.

An engine starts its processes one after the other, and each spends its first seconds with the same imports: an
interpreter that ``multiprocessing`` has spawned begins with nothing. Here the interpreters are started at once, import
in parallel, and wait; when the engine spawns a process, one of them becomes it. It is a child of the same parent, gets
the same file descriptors and environment, and runs the same code.

Whenever becoming it could make a difference, the waiting interpreter executes (``execve``) what would have been
spawned instead: the same process as without all this, only later. That is so if a variable of the environment has
changed that imported libraries may have read, if a resource limit has, if another program is to be executed (one that
binds memory first, for example), or if a descriptor is in the way. And where none waits, ``multiprocessing`` spawns as
ever.
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

#: How the command line of a process that stands by can be told.
MARK: Final = "dynamo_worker.kit.preload"
#: Variables that change while a worker starts and that no engine reads: the worker's own, and the runtime's.
_OWN: Final = frozenset(
    {
        *("DYNAMO_WORKER_CONTROL_FD", "DYN_LOG", "DYN_SYSTEM_HOST", "DYN_SYSTEM_PORT", "DYN_FILE_KV"),
        *("DYN_SYSTEM_STARTING_HEALTH_STATUS", "DYN_SELF_HOST_METADATA", "DYN_RUNTIME_NUM_WORKER_THREADS"),
        *("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"),
        "DYN_EVENT_PLANE_HOST",
    }
)
#: Seconds after which a process that nobody needed ends.
_PATIENCE = 120.0
#: Descriptors of ours are above this number: those that a process is given are mostly below, and keep their numbers.
_HIGH = 200
_LIMITS: Final = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
_spawnv = getattr(util, "spawnv_passfds", None)


@dataclass(frozen=True)
class Level:
    """What one generation of processes will need.

    :param modules: what they import; one that cannot be imported is left to the process itself.
    :param count: how many processes.
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
    """Start processes for what ``multiprocessing`` spawns from now on.

    :param levels: of the processes that this one spawns, of those that they spawn, and so on.
    :param harmless: variables of the environment that may change until then, because nothing reads them on import.
    :param readers: variables that only one module reads on import, and which: they may change until it is imported.
    :param expected: variables that will be set by then, unless they are now, and to what; imports find them so.
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
            # The flags of this interpreter, as for every other process of multiprocessing.
            options: list[str] = util._args_from_interpreter_flags()  # type: ignore[attr-defined] # noqa: SLF001
            path = os.fsencode(spawn.get_executable())
            options = [option for option in options if option != "-P"]
            pid = _spawnv(path, [path, *options, *code_arguments(code)], [theirs.fileno()])
        environment = {**expected, **os.environ}
        _waiting.append(_Waiting(pid, ours, environment))
        # Libraries may have put more into the process's environment than Python knows of.
        text = json.dumps(environment).encode()
        with contextlib.suppress(OSError):  # it has died already, which shows when it is asked
            ours.sendall(len(text).to_bytes(8, "big") + text)


def _moved(end: socket.socket, least: int) -> socket.socket:
    """Return the same socket under a number that is at least ``least``."""
    with end:
        return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, least))


def dismiss() -> None:
    """End the processes that were not needed."""
    while _waiting:
        one = _waiting.pop()
        one.connection.close()
        with contextlib.suppress(OSError):
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)


def _spawn(path: Any, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """Take the place of ``multiprocessing.util.spawnv_passfds``: return the pid of a process that runs ``args``."""
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
                # The descriptors first, so that they come with the first byte.
                socket.send_fds(one.connection, [b"\0"], numbers)
                one.connection.sendall(json.dumps(task).encode())
                return one.pid
    pid: int = _spawnv(path, args, passfds)
    return pid


def _changed(environment: dict[str, str]) -> list[str]:
    """Return the variables that are not what they were."""
    names = environment.keys() | os.environ.keys()
    return sorted(name for name in names if environment.get(name) != os.environ.get(name))


# ------------------------------------------------------------------------------------------ the process that waits


def main(connection: int, task: str) -> None:
    """Import, wait, and become what is asked for."""
    levels, harmless, readers = json.loads(task)
    # Names processes; it finds the memory for the name only as long as the environment is where the kernel has put it.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()
    channel = socket.socket(fileno=connection)
    length = int.from_bytes(_received(channel, 8), "big")
    os.environ.clear()
    os.environ.update(json.loads(_received(channel, length)))
    # Standing by for one's own children can begin now: they import beside this process.
    prepare([Level(**level) for level in levels[1:]], harmless, readers=readers)
    for module in levels[0]["modules"]:
        with contextlib.suppress(Exception):  # the process itself will say what is wrong with it
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
        os._exit(0)  # the parent is gone, or needs nobody
    unread = {name for name, reader in readers.items() if reader not in sys.modules}
    _become(json.loads(order), descriptors, _OWN | unread | set(harmless))


def _received(channel: socket.socket, length: int) -> bytes:
    """Return so many bytes; end the process if its parent is gone."""
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
    # Away from the numbers that they shall get.
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    in_the_way = [number for number in numbers if number > 2 and _is_open(number)]
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order["directory"])
    # What this process's own imports have set alike is no difference.
    obstacles = [
        name for name in order["changed"] if name not in harmless and os.environ.get(name) != environment.get(name)
    ]
    # The stacks of threads, for one, are as large as the limit was when the program was loaded.
    limits = [(number, tuple(limit)) for number, limit in order["limits"]]
    limits = [(number, limit) for number, limit in limits if resource.getrlimit(number) != limit]
    for number, limit in limits:
        resource.setrlimit(number, limit)
    other_program = order["path"] != sys.executable
    if obstacles or in_the_way or limits or other_program:
        log.debug(
            "Standby process begins anew",
            changed=",".join(obstacles),
            descriptors=len(in_the_way),
            limits=len(limits),
            other_program=other_program,
        )
        os.execve(order["path"], order["args"], environment)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew, in the environment
    args: list[str] = order["args"]
    at = args.index("-c")
    sys.argv = ["-c", *args[at + 2 :]]
    exec(args[at + 1], {"__name__": "__main__"})  # noqa: S102 - what the interpreter would do with `-c`
