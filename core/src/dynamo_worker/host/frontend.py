"""An OpenAI HTTP frontend from ``ai-dynamo-runtime`` as a process of its own, beside one worker or for several."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dynamo_worker import logs
from dynamo_worker.address import Address
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host import native_output
from dynamo_worker.host.discovery_directory import writable_directory
from dynamo_worker.host.drain_mode import DrainMode
from dynamo_worker.host.listening import listening_sockets
from dynamo_worker.host.options import DEFAULT_FRONTEND, MOST_MIGRATIONS, LogFormat, LogLevel
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import ledger, linux
from dynamo_worker.supervisor.frontend import failure
from dynamo_worker.supervisor.interpreter import module_command
from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_worker.host.settings import WorkerSettings

log = get_logger(__name__)

#: Router modes by flag value, each the name of a member of ``dynamo.llm.RouterMode``.
ROUTER_MODES = {
    "round-robin": "RoundRobin",
    "random": "Random",
    "kv": "KV",
    "least-loaded": "LeastLoaded",
}
#: How long a frontend has for what it carries when its worker ends all requests (``--drain abort``), in seconds.
FRONTEND_ABORT_SECONDS = 1.0
#: How long a frontend may take to open its port, and then to offer the model, in seconds.
_START_SECONDS = 30.0
#: Seconds between two looks at a frontend that is starting, and at the requests of one that is ending.
_POLL_SECONDS = 0.02
#: Longest time for one question to a frontend that is starting, in seconds.
_QUESTION_SECONDS = 5.0
#: Names the worker beside which a frontend runs: it ends with it.
_WORKER = "DYNAMO_WORKER_FRONTEND_OF"
#: Dynamo's variable for the seconds that a frontend has, at its end, for the requests in flight.
_DRAIN_VARIABLE = "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"
_DRAIN_SECONDS = "5"
#: The gauge on ``/metrics`` that counts requests from their arrival to the last byte of the answer.
_ACTIVE = re.compile(r"^\w+_active_requests(?:\{.*\})? (\S+)$", re.MULTILINE)


def parse_address(text: str) -> Address:
    """Read the address of ``--http``.

    :raises UsageError: it is none.
    """
    try:
        return Address.parse(text, DEFAULT_FRONTEND)
    except ValueError as error:
        raise UsageError(f"--http: {text!r} {error}") from error


class FrontendProcess:
    """The frontend that ``--frontend`` starts beside the worker.

    It may carry streams of other workers too, among them those that this one hands off at its end. So it outlives the
    worker: asked to end, it takes no new connections and finishes what it carries. Whoever cleans up behind the worker
    finds it in the ledger and waits for it (``supervisor/frontend.py``).
    """

    def __init__(self, process: subprocess.Popen[bytes], address: Address) -> None:
        self._process = process
        self._address = address

    @classmethod
    def start(cls, settings: WorkerSettings, discovery_path: Path | None, run_dir: Path | None) -> FrontendProcess:
        """Start it; :meth:`wait_ready` waits for it.

        :param run_dir: where its process is recorded for whoever cleans up.
        :raises StartError: its address is in use.
        """
        assert settings.frontend is not None
        address = settings.frontend
        _check_free(address)
        command = [*module_command("dynamo_worker"), "frontend", "--http", str(settings.frontend)]
        command += ["--discovery-backend", settings.discovery_backend, "--request-plane", settings.request_plane]
        command += ["--migration-limit", str(settings.migration_limit), "--router-mode", settings.router_mode]
        command += ["--log-level", settings.log_level, "--log-format", settings.log_format]
        if settings.event_plane:
            command += ["--event-plane", settings.event_plane]
        if discovery_path is not None:
            command += ["--discovery-path", str(discovery_path)]
        seconds = FRONTEND_ABORT_SECONDS if settings.drain is DrainMode.ABORT else settings.termination_grace_period
        # What the worker has set as its own default is not what the frontend should log.
        inherited = {name: value for name, value in os.environ.items() if value != logs.WORKER_RUNTIME_LOG}
        inherited[_WORKER] = str(os.getpid())
        if not inherited.get(_DRAIN_VARIABLE):
            inherited[_DRAIN_VARIABLE] = f"{seconds:g}"
        # A session of its own, so that a Ctrl-C meant for the supervisor does not end it under running requests.
        process = subprocess.Popen(command, env=inherited, stdin=subprocess.DEVNULL, start_new_session=True)
        stat = linux.read_stat(process.pid)
        if run_dir is not None and stat is not None:
            ledger.record_frontend(run_dir, Process(process.pid, stat.start), seconds)
        return cls(process, address)

    @property
    def pid(self) -> int:
        """The process to watch."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._address}"

    async def wait_ready(self, model: str | None = None) -> None:
        """Wait until it accepts connections, and until it offers the model.

        :param model: name of a model that is registered.
        :raises StartError: it ended, does not listen in time, or does not find the model.
        """
        missing = f"the frontend does not listen on {self.url}"
        deadline = Deadline.after(_START_SECONDS)
        while not deadline.passed:
            if self._process.poll() is not None:
                raise StartError(
                    f"the frontend ended during its start (exit code {self._process.returncode})",
                    hint="its own messages stand above this line",
                )
            with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, KeyError, TypeError):
                answer = await asyncio.wait_for(
                    self._ask(os.environ.get("DYN_HTTP_SVC_MODELS_PATH") or "/v1/models"), _QUESTION_SECONDS
                )
                if model is None:
                    return
                missing = f"the frontend does not offer {model!r}"
                if any(entry["id"] == model for entry in json.loads(answer)["data"]):
                    return
            await asyncio.sleep(_POLL_SECONDS)
        raise StartError(f"{missing} after {_START_SECONDS:g} s", hint="its own messages stand above this line")

    async def check(self) -> None:
        """Return as soon as it answers anything at all.

        :raises OSError: it accepts no connection.
        """
        await self._ask(os.environ.get("DYN_HTTP_SVC_LIVE_PATH") or "/live")

    async def _ask(self, path: str) -> bytes:
        """Return the body of one answer; HTTP/1.0 has it end with the connection."""
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {self._address}\r\n\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
        if not answer:
            raise ConnectionResetError("no answer")
        return answer.partition(b"\r\n\r\n")[2]

    def drain(self) -> None:
        """Have it take no new connections, and end as soon as it carries nothing any more."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # a stopped process hears nothing before

    @property
    def failure(self) -> str | None:
        """How it has failed, in words; None if it still runs or did as it was asked."""
        code = self._process.poll()
        return None if code is None else failure(code)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    async def stop(self, deadline: Deadline) -> None:
        """End it by the deadline, as soon as it carries nothing any more."""
        self.drain()
        while self._process.poll() is None:
            if deadline.passed:
                self._process.kill()
                self._process.wait()
                return
            await asyncio.sleep(0.005)


def _check_free(address: Address) -> None:
    """Make sure that the frontend's address can be bound; the runtime itself would only say that it failed.

    :raises StartError: it cannot.
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
            f"the frontend's address {host}:{port} {why}", hint="choose another: --frontend HOST:PORT"
        ) from error


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text.lower() not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text.lower()

    return check


def _migrations(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text[:20]) > MOST_MIGRATIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and {MOST_MIGRATIONS}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``dynamo-worker frontend``."""
    result = argparse.ArgumentParser(
        prog="dynamo-worker frontend",
        description="Serve an OpenAI-compatible HTTP API for the workers found in discovery, with request migration.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, variable: str, default: str | None, check: Callable[[str], Any], **more: Any) -> None:
        """Add a flag with a default from the environment; an empty variable counts as unset."""
        given = os.environ.get(variable)

        def checked(text: str) -> Any:
            # argparse passes defaults through here as well; `choices` alone would let bad ones through.
            try:
                return check(text)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{error} (from {variable})" if text is given else error) from None

        result.add_argument(flag, default=given or default, type=checked, **more)

    def choice(flag: str, variable: str, default: str | None, names: tuple[str, ...], text: str) -> None:
        add(flag, variable, default, _one_of(*names), metavar=f"{{{','.join(names)}}}", help=text)

    result.add_argument("--http", default=DEFAULT_FRONTEND, metavar="HOST:PORT", help="address to listen on")
    choice(
        "--discovery-backend",
        "DYN_DISCOVERY_BACKEND",
        "file",
        ("file", "etcd", "kubernetes", "mem"),
        "where workers are found",
    )
    add("--discovery-path", "DYN_FILE_KV", None, str, metavar="DIR", help="directory of the file backend")
    choice("--request-plane", "DYN_REQUEST_PLANE", "tcp", ("tcp", "nats"), "transport")
    choice("--event-plane", "DYN_EVENT_PLANE", None, ("nats", "zmq"), "transport of KV events")
    add(
        "--migration-limit",
        "DYN_MIGRATION_LIMIT",
        "3",
        _migrations,
        metavar="N",
        help="how often one request may move to another worker",
    )
    choice(
        "--router-mode", "DYN_ROUTER_MODE", "round-robin", tuple(ROUTER_MODES), "how requests are spread over workers"
    )
    choice("--log-level", "DYN_WORKER_LOG_LEVEL", "info", get_args(LogLevel), "least severity that is logged")
    choice("--log-format", "DYN_WORKER_LOG_FORMAT", "text", get_args(LogFormat), "lines for people, or JSON objects")
    return result


def _drain_seconds() -> float:
    """Return how long requests in flight may take at the end.

    :raises UsageError: the variable for it is no number.
    """
    text = os.environ.get(_DRAIN_VARIABLE) or _DRAIN_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**7:
        raise UsageError(f"{_DRAIN_VARIABLE}={text} is not a number of seconds")
    return seconds


def main(argv: list[str]) -> int:
    """Run the frontend until SIGTERM or SIGINT.

    :raises StartError: the address is in use.
    :raises UsageError: a variable or the address is wrong, or the discovery directory cannot be used.
    """
    worker = os.environ.pop(_WORKER, None)
    # Whatever becomes of its worker and of who cleans up: a frontend never stays behind.
    if worker is not None and not linux.on_parent_death(signal.SIGTERM, int(worker)):
        return 0
    import uvloop

    args = parser().parse_args(argv)
    drain_seconds = _drain_seconds()
    address = parse_address(args.http).resolved("--http")
    logs.setup(args.log_level, args.log_format)
    quiet = args.log_level != "debug" and "DYN_LOG" not in os.environ
    if quiet:
        logs.quiet_runtime(logs.FRONTEND_RUNTIME_LOG)
    if args.log_format == "json":
        os.environ.setdefault("DYN_LOGGING_JSONL", "true")
    _check_free(address)
    if args.discovery_backend == "file":
        path = writable_directory(Path(args.discovery_path) if args.discovery_path else None)
        os.environ["DYN_FILE_KV"] = str(path)
    # The runtime's own status server would want the worker's port.
    os.environ["DYN_SYSTEM_PORT"] = "-1"
    with contextlib.closing(native_output.RequestLineFilter()) if quiet else contextlib.nullcontext():
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.run_until_complete(_serve(address, args, drain_seconds, embedded=worker is not None))
    # The runtime's own threads take a quarter of a second to notice the end of the interpreter; nobody needs that.
    os._exit(0)


async def _serve(address: Address, args: argparse.Namespace, drain_seconds: float, *, embedded: bool) -> None:
    from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

    from dynamo_worker.host.runtime import connect

    loop = asyncio.get_running_loop()
    runtime = connect(args.discovery_backend, args.request_plane, args.event_plane)
    engine = await make_engine(
        runtime,
        EntrypointArgs(
            EngineType.Dynamic,
            http_host=address.host,
            http_port=address.port,
            router_config=RouterConfig(getattr(RouterMode, ROUTER_MODES[args.router_mode])),
            migration_limit=args.migration_limit,
        ),
    )
    stopped = asyncio.Event()

    def stop() -> None:
        if stopped.is_set() and not embedded:  # beside a worker the kernel and whoever cleans up both send the signal
            os._exit(0)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.ensure_future(run_input(runtime, "http", engine))
    stopping = asyncio.ensure_future(stopped.wait())
    sending_at_once = asyncio.ensure_future(_send_at_once(address))
    log.info("Frontend listening", url=f"http://{address}")
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    sending_at_once.cancel()
    if not serving.done():
        deadline = Deadline.after(drain_seconds)
        await asyncio.to_thread(_drain, address, deadline)
        runtime.shutdown()
        await asyncio.wait({serving}, timeout=deadline.remaining())
    if serving.done():
        serving.result()


def _drain(address: Address, deadline: Deadline) -> None:
    """Take no new connections and wait until no request is in flight, with the runtime left as it is.

    The runtime has a drain of its own, but it leaves discovery before: a stream whose worker ends meanwhile could not
    move to another one (measured on 1.6.1).
    """
    connection = http.client.HTTPConnection(*address, timeout=max(0.1, deadline.within(_QUESTION_SECONDS).remaining()))
    path = os.environ.get("DYN_HTTP_SVC_METRICS_PATH") or "/metrics"
    listening = True
    try:
        while not deadline.passed:
            connection.request("GET", path)
            counts = _ACTIVE.findall(connection.getresponse().read().decode("utf-8", "replace"))
            if listening:
                # Only now: this connection, and every one that came before, has been accepted.
                _stop_listening(address)
                listening = False
            elif not any(map(float, counts)):
                return
            else:
                time.sleep(_POLL_SECONDS)
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning("Requests in flight cannot be counted", error=error)
    finally:
        connection.close()


def _stop_listening(address: Address) -> None:
    """Close the runtime's listening socket under its hands: it has no call for that.

    Its descriptor keeps its number, but refers to another socket from then on, to which nobody connects.
    """
    with socket.socket(socket.AF_UNIX) as nobodys:
        nobodys.setblocking(False)
        nobodys.bind("")  # the kernel picks a name without a file
        nobodys.listen()
        for descriptor, _ in _listeners(address):
            os.dup2(nobodys.fileno(), descriptor, inheritable=False)


async def _send_at_once(address: Address) -> None:
    """Have the frontend send every token when it comes; the runtime leaves Nagle's algorithm on.

    A client that keeps its connection acknowledges after 40 ms, and until then the kernel keeps the next token back
    (measured on 1.6.1: 44 ms to the first token instead of 2). Connections take the option over from their listener.
    """
    deadline = Deadline.after(_START_SECONDS)
    found = False
    while not found and not deadline.passed:
        with contextlib.suppress(OSError):  # no descriptor left to look with
            for _, listener in _listeners(address):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found = True
        await asyncio.sleep(_POLL_SECONDS)


def _listeners(address: Address) -> Iterator[tuple[int, socket.socket]]:
    for descriptor, listener in listening_sockets():
        if listener.getsockname()[:2] == tuple(address):
            yield descriptor, listener
