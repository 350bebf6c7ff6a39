"""An engine that lives in a process of its own: the worker's side.

:class:`ChildProcess` starts the process, hands requests to it, notices its death and ends it in time. The process runs
a :class:`~dynamo_worker.kit.child_loop.StepEngine` or a :class:`~dynamo_worker.kit.child_tasks.TaskEngine`, or any
program that speaks as :mod:`~dynamo_worker.kit.child_messages` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import EngineDeadError
from dynamo_worker.kit.child_exchange import Exchange
from dynamo_worker.kit.child_messages import MOST_BYTES, VARIABLE
from dynamo_worker.kit.engine_lifecycle import start_error
from dynamo_worker.kit.python_command import python_command
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import linux, process_tree

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

log = get_logger(__name__)

#: Least limit for messages of a process.
_LEAST_BYTES: Final = 1 << 16
#: Seconds for what a dead process has written while another one still holds its connection, and for the exit status of
#: a process that has closed its connection.
_LAST_WORDS_SECONDS, _EXIT_SECONDS = 0.2, 0.5
#: Seconds before its deadline at which a process is killed that has not ended, and that it gets to end after a failed
#: start.
_KILL_SECONDS, _FAILED_SECONDS = 0.2, 2.0
#: Seconds for the processes of its session once it has ended, before and after they are killed.
_REST_SECONDS: Final = 0.3
_POLL_SECONDS: Final = 0.01


class ChildProcess:
    """One process of an engine, and the requests that are in it.

    Its methods belong to one event loop, and none of them blocks it. The process leads a session of its own, and
    prints to the worker's output.
    """

    def __init__(
        self,
        name: str,
        program: str | Sequence[str],
        options: Any = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Prepare the process; :meth:`start` starts it.

        :param name: the engine's name in messages.
        :param program: the engine's class in the process, ``package.module:Class``, or the command of a program that
            is not written in Python.
        :param options: what its ``start`` gets, anything that JSON can carry. Unlike a command line, nobody else can
            read them.
        :param directory: its current directory; None for that of the worker.
        :param environment: environment variables beside those of the worker.
        :param most_bytes: length limit of one message from the process; a single chunk has to fit. At least 64 KiB.
        """
        if most_bytes < _LEAST_BYTES:
            raise ValueError(f"most_bytes: {most_bytes} is less than {_LEAST_BYTES}, which a traceback may take")
        self.name = name
        self._command = [*python_command(f"{__package__}.child_main"), program] if isinstance(program, str) else program
        self._options, self._directory, self._environment = options, directory, environment
        self._most_bytes = most_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._exited = asyncio.Event()
        self._exchange = Exchange(name, most_bytes, self._on_end)

    async def start(self) -> Any:
        """Start the process, wait until its engine is ready, and return what the engine's ``start`` returned.

        There is no time limit: models are large. A caller that gives up calls :meth:`shutdown`, which may also be
        called meanwhile.

        :raises StartError: the engine failed, with its traceback; the process ended; or it was shut down.
        """
        if self._process is not None:
            raise RuntimeError(f"{self.name} is started already")
        loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        exchange = self._exchange = Exchange(self.name, self._most_bytes, self._on_end)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    self._command,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **(self._environment or {}), VARIABLE: str(theirs.fileno())},
                    stdin=subprocess.DEVNULL,
                    cwd=self._directory,
                    start_new_session=True,
                )
            self._pidfd = os.pidfd_open(self._process.pid)
            loop.add_reader(self._pidfd, self._on_exit)
            await loop.create_unix_connection(lambda: exchange, sock=ours)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                await self.shutdown(Deadline.after(_KILL_SECONDS))
                raise start_error(self.name, error) from error
            raise
        try:
            await exchange.begin({"start": self._options, "most_bytes": self._most_bytes, "path": _import_path()})
        except EngineDeadError:
            await self.shutdown(Deadline.after(_FAILED_SECONDS))
            trace = exchange.failure
            what = f"{trace.rpartition(chr(10))[2]}\n{trace}" if trace else exchange.dead
            raise start_error(self.name, what) from None
        return exchange.info

    @property
    def info(self) -> Any:
        """What the engine's ``start`` has returned in the process; None before."""
        return self._exchange.info

    def generate(self, request_id: str, payload: Any) -> AsyncGenerator[Any, None]:
        """Hand a request to the engine and yield the chunks that it sends, each as it was sent.

        A generator that is cancelled or closed early aborts its request. A request waits in its task while the process
        does not take what was sent before; the engine is asked to pause a request whose chunks nobody reads.

        :param request_id: the id that the engine sees. Two requests at once may have the same.
        :param payload: anything that JSON can carry.
        :raises InvalidRequestError: the engine has refused the request.
        :raises EngineDeadError: the process has ended, has sent something that is no message, or is not started.
        :raises RuntimeError: the engine has failed with this request, or its client reads too slowly.
        """
        return self._exchange.generate(request_id, payload)

    async def abort(self, request_id: str) -> None:
        """End the requests with an id, if there are any: their generators raise :class:`asyncio.CancelledError`."""
        self._exchange.abort(request_id)

    async def ask(self, question: str, payload: Any = None) -> Any:
        """Ask the engine something between two of its steps, and return what its ``answer`` returned.

        :raises EngineDeadError: the process has ended.
        :raises RuntimeError: the engine has failed to answer.
        """
        return await self._exchange.asked("ask", {"question": question, "payload": payload})

    def check(self) -> None:
        """Return if the process serves, even if it hangs: the worker finds that out with a canary request.

        :raises EngineDeadError: the process has ended.
        """
        self._exchange.check()

    async def check_health(self) -> None:
        """Return when the process has answered a ping, between two of its steps. There is no time limit.

        :raises EngineDeadError: the process has ended.
        """
        await self._exchange.asked("ping", {})

    def processes(self) -> list[int]:
        """Return the pid of the process; none before the start and after the shutdown."""
        return [] if self._process is None else [self._process.pid]

    def progress(self) -> int:
        """Return the number of steps that the engine has reported."""
        return self._exchange.progress()

    async def shutdown(self, deadline: Deadline) -> None:
        """End the process with SIGTERM, kill it shortly before the deadline, and end what it leaves of its session.

        Does nothing if it is not started. Requests in progress end with :class:`EngineDeadError`.
        """
        process = self._process
        if process is None:
            return
        self._exchange.lost("it was shut down")
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process does not handle the SIGTERM
            _send_signal(process.pid, number)
        self._exchange.close()
        if not await self._has_exited(deadline.reserve(_KILL_SECONDS).remaining()):
            log.warning("Engine process killed", engine=self.name, pid=process.pid, reason="it did not end in time")
            _send_signal(process.pid, signal.SIGKILL)
            await self._has_exited(_KILL_SECONDS)
        if self._process is None:  # another call was faster
            return
        self._process = None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if process.poll() is None:
            log.warning("Engine process survives SIGKILL", engine=self.name, pid=process.pid, next="leave it")
        await _end_session(process.pid, deadline)

    async def _has_exited(self, seconds: float) -> bool:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._exited.wait(), seconds)
        return self._exited.is_set()

    def _on_end(self) -> None:
        """Take the end of the connection: the exit status, which may come later, says why."""
        if self._process is not None:
            seconds = 0.0 if self._exited.is_set() else _EXIT_SECONDS
            asyncio.get_running_loop().call_later(seconds, self._died, self._process, self._exchange)

    def _on_exit(self) -> None:
        """Take the end of the process: what it has written may still be on its way."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        self._exited.set()
        seconds = 0.0 if self._exchange.closed else _LAST_WORDS_SECONDS
        loop.call_later(seconds, self._died, self._process, self._exchange)

    def _died(self, process: subprocess.Popen[bytes], exchange: Exchange) -> None:
        if process is self._process:
            exchange.lost(f"its process {_end_of(process.pid)}")


def _import_path() -> list[str]:
    """Return where this process finds modules: an engine's plugin may not be installed."""
    return [os.path.abspath(place) for place in sys.path if place]


def _send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a child that has not been reaped: the pid is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_of(pid: int) -> str:
    """Describe the end of a child without reaping it: until the shutdown, its pid must not become another one's."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return "has closed its connection"
    if result.si_code == os.CLD_EXITED:
        return f"has exited with code {result.si_status}"
    with contextlib.suppress(ValueError):  # most real-time signals have no name
        return f"was killed by {signal.Signals(result.si_status).name}"
    return f"was killed by signal {result.si_status}"


async def _end_session(leader: int, deadline: Deadline) -> None:
    """End the processes that a process has left in its group, once it is reaped.

    Those that release shared memory end by themselves when all others are gone.
    """
    patience = deadline.within(_REST_SECONDS)
    while not patience.passed:
        if not _has_members(leader):
            return
        await asyncio.sleep(_POLL_SECONDS)
    for pid in linux.all_pids():
        stat = linux.read_stat(pid)
        if stat is not None and stat.group == leader and not process_tree.is_resource_tracker(pid):
            linux.send_signal(linux.Process(pid, stat.start), signal.SIGKILL)
    patience = Deadline.after(_REST_SECONDS)
    while _has_members(leader) and not patience.passed:
        await asyncio.sleep(_POLL_SECONDS)


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True
