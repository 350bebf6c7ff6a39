"""An OpenAI HTTP frontend from ``ai-dynamo-runtime`` as a process of its own, beside one worker or for several."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from dynamo_worker import logs
from dynamo_worker.address import Address
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.logs import get_logger
from dynamo_worker.options import DEFAULT_FRONTEND

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.settings import WorkerSettings

log = get_logger(__name__)

#: Router modes by flag value, each the name of a member of ``dynamo.llm.RouterMode``.
ROUTER_MODES = {
    "round-robin": "RoundRobin",
    "random": "Random",
    "kv": "KV",
    "least-loaded": "LeastLoaded",
}
#: How long a frontend may take to end once it was asked to, in seconds. Nothing is in flight by then.
_STOP_SECONDS = 1.0
#: How long a frontend may take to open its port, in seconds.
_START_SECONDS = 30.0


def parse_address(text: str) -> Address:
    """Read the address of ``--http``.

    :raises UsageError: it is none.
    """
    try:
        return Address.parse(text, DEFAULT_FRONTEND)
    except ValueError as error:
        raise UsageError(f"--http: {text!r} {error}") from error


class FrontendProcess:
    """The frontend that ``--frontend`` starts beside the worker."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address) -> None:
        self._process = process
        self._address = address

    @classmethod
    def start(cls, settings: WorkerSettings, discovery_path: Path | None) -> FrontendProcess:
        """Start it; :meth:`wait_ready` waits for it.

        :raises StartError: its address is in use.
        """
        assert settings.frontend is not None
        address = settings.frontend
        _check_free(address)
        command = [sys.executable, "-m", "dynamo_worker", "frontend", "--http", str(settings.frontend)]
        command += ["--discovery-backend", settings.discovery_backend, "--request-plane", settings.request_plane]
        command += ["--migration-limit", str(settings.migration_limit), "--router-mode", settings.router_mode]
        if settings.event_plane:
            command += ["--event-plane", settings.event_plane]
        if discovery_path is not None:
            command += ["--discovery-path", str(discovery_path)]
        # What the worker has set as its own default is not what the frontend should log.
        inherited = {name: value for name, value in os.environ.items() if value != logs.WORKER_RUNTIME_LOG}
        inherited |= {"DYN_WORKER_LOG_LEVEL": settings.log_level, "DYN_WORKER_LOG_FORMAT": settings.log_format}
        # A session of its own, so that a Ctrl-C meant for the supervisor does not end it under running requests.
        process = subprocess.Popen(command, env=inherited, stdin=subprocess.DEVNULL, start_new_session=True)
        return cls(process, address)

    @property
    def pid(self) -> int:
        """The process to watch."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._address}"

    async def wait_ready(self) -> None:
        """Wait until it accepts connections.

        :raises StartError: it ended, or does not listen in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_SECONDS
        while loop.time() < deadline:
            if self._process.poll() is not None:
                raise StartError(
                    f"the frontend ended during its start (exit code {self._process.returncode})",
                    hint="its own messages stand above this line",
                )
            try:
                _, writer = await asyncio.open_connection(*self._address)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return
        raise StartError(f"the frontend does not listen on {self.url} after {_START_SECONDS:g} s")

    async def stop(self) -> None:
        """End it: nothing is in flight any more."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _STOP_SECONDS
        self._process.terminate()
        while self._process.poll() is None:
            if loop.time() >= deadline:
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


def _one_of(*names: str) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` that restrict a value; `choices` alone lets bad defaults through."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return {"type": check, "metavar": f"{{{','.join(names)}}}"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``dynamo-worker frontend``."""
    result = argparse.ArgumentParser(
        prog="dynamo-worker frontend",
        description="Serve an OpenAI-compatible HTTP API for the workers found in discovery, with request migration.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    environment = os.environ.get
    result.add_argument("--http", default=DEFAULT_FRONTEND, metavar="HOST:PORT", help="address to listen on")
    result.add_argument(
        "--discovery-backend",
        default=environment("DYN_DISCOVERY_BACKEND", "file"),
        **_one_of("file", "etcd", "kubernetes", "mem"),
        help="where workers are found",
    )
    result.add_argument(
        "--discovery-path", default=environment("DYN_FILE_KV"), metavar="DIR", help="directory of the file backend"
    )
    result.add_argument(
        "--request-plane", default=environment("DYN_REQUEST_PLANE", "tcp"), **_one_of("tcp", "nats"), help="transport"
    )
    result.add_argument(
        "--event-plane", default=environment("DYN_EVENT_PLANE"), **_one_of("nats", "zmq"), help="transport of KV events"
    )
    result.add_argument(
        "--migration-limit",
        type=int,
        default=environment("DYN_MIGRATION_LIMIT", "3"),
        metavar="N",
        help="how often one request may move to another worker",
    )
    result.add_argument(
        "--router-mode",
        default=environment("DYN_ROUTER_MODE", "round-robin"),
        **_one_of(*ROUTER_MODES),
        help="how requests are spread over workers",
    )
    return result


def main(argv: list[str]) -> int:
    """Run the frontend until SIGTERM or SIGINT.

    :raises StartError: the address is in use.
    """
    import uvloop

    args = parser().parse_args(argv)
    logs.setup(os.environ.get("DYN_WORKER_LOG_LEVEL", "info"), os.environ.get("DYN_WORKER_LOG_FORMAT", "text"))
    logs.quiet_runtime(logs.FRONTEND_RUNTIME_LOG)
    address = parse_address(args.http)
    _check_free(address)
    if args.discovery_path:
        os.environ["DYN_FILE_KV"] = args.discovery_path
    # The runtime's own status server would want the worker's port.
    os.environ["DYN_SYSTEM_PORT"] = "-1"
    uvloop.run(_serve(address, args))
    return 0


async def _serve(address: Address, args: argparse.Namespace) -> None:
    from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input
    from dynamo.runtime import DistributedRuntime

    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, args.discovery_backend, args.request_plane, event_plane=args.event_plane)
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
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    serving = asyncio.ensure_future(run_input(runtime, "http", engine))
    stopping = asyncio.ensure_future(stopped.wait())
    log.info("Frontend listening", url=f"http://{address}")
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        runtime.shutdown()
        await asyncio.wait({serving}, timeout=float(os.environ.get("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "5")))
    if serving.done():
        serving.result()
    # The runtime's own threads take a quarter of a second to notice the end of the interpreter; nobody needs that.
    os._exit(0)
