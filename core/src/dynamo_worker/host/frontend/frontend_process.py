"""The frontend process that ``--frontend`` starts beside a worker."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Final

from dynamo_worker import logs
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import StartError
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.options import FRONTEND_OPTIONS
from dynamo_worker.supervisor import ledger, linux
from dynamo_worker.supervisor.frontend import failure
from dynamo_worker.supervisor.interpreter import module_command
from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.address import Address
    from dynamo_worker.host.config.settings import WorkerSettings

#: Time limit for the frontend's requests when its worker aborts all of its own (``--drain abort``), in seconds.
FRONTEND_ABORT_SECONDS: Final = 1.0
#: Holds the process id of the worker beside which the frontend runs; the frontend drains when that worker dies.
WORKER_VARIABLE: Final = "DYNAMO_WORKER_FRONTEND_OF"
#: Dynamo's variable for the frontend's time limit for requests in flight at shutdown, in seconds.
DRAIN_VARIABLE: Final = "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"
#: Time limit for a frontend to listen, and then to offer the model, in seconds.
_START_SECONDS: Final = 30.0
#: Interval between two queries to a starting frontend, in seconds.
_POLL_SECONDS: Final = 0.02
#: Time limit for one query to a frontend, in seconds.
_QUERY_SECONDS: Final = 5.0
_HINT: Final = "see the frontend's log output above"


class FrontendProcess:
    """The frontend that ``--frontend`` starts beside the worker.

    It may carry streams of other workers too, including those this worker hands off at shutdown, so it outlives the
    worker: on SIGTERM it takes no new connections and finishes its requests. The supervisor finds it in the ledger and
    waits for it (``supervisor/frontend.py``).
    """

    def __init__(self, process: subprocess.Popen[bytes], address: Address) -> None:
        self._process = process
        self._address = address

    @classmethod
    def start(cls, settings: WorkerSettings, discovery_path: Path | None, run_dir: Path) -> FrontendProcess:
        """Start the process without waiting for it; see :meth:`wait_ready`.

        :param discovery_path: directory of the ``file`` discovery backend.
        :param run_dir: where the process is recorded for the supervisor.
        :raises StartError: its address is in use.
        """
        assert settings.frontend is not None
        address = settings.frontend
        check_free(address)
        command = [*module_command("dynamo_worker"), "frontend"]
        values = settings.model_dump(mode="json") | {"http": str(address), "discovery_path": discovery_path}
        for option in FRONTEND_OPTIONS:
            value = values[option.name]
            if value is not None:
                command += [option.flag, str(value)]
        seconds = FRONTEND_ABORT_SECONDS if settings.drain is DrainMode.ABORT else settings.termination_grace_period
        # The worker's own default for DYN_LOG does not suit the frontend.
        inherited = {name: value for name, value in os.environ.items() if value != logs.WORKER_RUNTIME_LOG}
        inherited[WORKER_VARIABLE] = str(os.getpid())
        if not inherited.get(DRAIN_VARIABLE):
            inherited[DRAIN_VARIABLE] = f"{seconds:g}"
        # In a new session, Ctrl-C in the supervisor's terminal does not end it while it has requests.
        process = subprocess.Popen(command, env=inherited, stdin=subprocess.DEVNULL, start_new_session=True)
        stat = linux.read_stat(process.pid)
        if stat is not None:
            ledger.record_frontend(run_dir, Process(process.pid, stat.start), seconds)
        return cls(process, address)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The base URL, ``http://127.0.0.1:8000``."""
        return f"http://{self._address}"

    async def wait_ready(self, model: str | None = None) -> None:
        """Wait until the frontend accepts connections and, if a model is given, offers it.

        :param model: name of a registered model, or None.
        :raises StartError: the frontend exited, or was not ready in time.
        """
        missing = f"the frontend is not listening on {self.url}"
        deadline = Deadline.after(_START_SECONDS)
        while not deadline.passed:
            if self._process.poll() is not None:
                raise StartError(
                    f"the frontend exited while starting (exit code {self._process.returncode})", hint=_HINT
                )
            with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, KeyError, TypeError):
                answer = await asyncio.wait_for(
                    self._ask(os.environ.get("DYN_HTTP_SVC_MODELS_PATH") or "/v1/models"), _QUERY_SECONDS
                )
                if model is None:
                    return
                missing = f"the frontend does not offer {model!r}"
                if any(entry["id"] == model for entry in json.loads(answer)["data"]):
                    return
            await asyncio.sleep(_POLL_SECONDS)
        raise StartError(f"{missing} after {_START_SECONDS:g} s", hint=_HINT)

    async def check(self) -> None:
        """Check that the frontend responds, whatever the response.

        :raises OSError: it does not respond.
        """
        await self._ask(os.environ.get("DYN_HTTP_SVC_LIVE_PATH") or "/live")

    async def _ask(self, path: str) -> bytes:
        """Return the body of one response. With HTTP/1.0 it ends with the connection."""
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {self._address}\r\n\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
        if not answer:
            raise ConnectionResetError("no response")
        return answer.partition(b"\r\n\r\n")[2]

    def drain(self) -> None:
        """Make it stop accepting connections and exit once its requests are done."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # a stopped process does not receive SIGTERM

    @property
    def failure(self) -> str | None:
        """How the process failed, in words; None while it runs and after a clean exit."""
        code = self._process.poll()
        return None if code is None else failure(code)

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    async def stop(self, deadline: Deadline) -> None:
        """Drain, then kill the process if it is still running at the deadline."""
        self.drain()
        while self._process.poll() is None:
            if deadline.passed:
                self._process.kill()
                self._process.wait()
                return
            await asyncio.sleep(0.005)


def check_free(address: Address) -> None:
    """Check that the frontend's address can be bound; the runtime's own error gives no reason.

    :raises StartError: it cannot be bound.
    """
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
        raise StartError(
            f"the frontend's address {host}:{port} {why}", hint="choose another one: --frontend HOST:PORT"
        ) from error
