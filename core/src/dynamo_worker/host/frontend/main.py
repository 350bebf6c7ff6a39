"""`dynamo-worker frontend`: an OpenAI HTTP frontend from ``ai-dynamo-runtime``, beside one worker or for several."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import logs
from dynamo_worker.address import Address
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import DiscoveryLostError, UsageError
from dynamo_worker.host import native_output, tracing
from dynamo_worker.host.config.options import DEFAULT_FRONTEND, FRONTEND_OPTIONS
from dynamo_worker.host.config.router_modes import ROUTER_MODES
from dynamo_worker.host.discovery import runtime_lease
from dynamo_worker.host.discovery.discovery_directory import writable_directory
from dynamo_worker.host.discovery.servers import wait_for_servers
from dynamo_worker.host.frontend.frontend_process import DRAIN_VARIABLE, WORKER_VARIABLE, check_free
from dynamo_worker.host.listening import listening_sockets
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import linux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_worker.errors import WorkerError
    from dynamo_worker.host.config.option_types import Option

log = get_logger(__name__)

#: Default of :data:`DRAIN_VARIABLE`, in seconds.
_DRAIN_SECONDS: Final = "5"
_MOST_DRAIN_SECONDS: Final = 10**7
#: Time limit for the runtime to open its port, in seconds.
_START_SECONDS: Final = 30.0
#: Time limit for one request to the frontend's own metrics, in seconds.
_QUERY_SECONDS: Final = 5.0
#: Interval at which the port and the requests in flight are polled, in seconds.
_POLL_SECONDS: Final = 0.02

#: The gauge on ``/metrics`` that counts requests from arrival to the last byte of the response.
_ACTIVE: Final = re.compile(r"^\w+_active_requests(?:\{.*\})? (\S+)$", re.MULTILINE)


def parse_address(text: str) -> Address:
    """Parse the address of ``--http``.

    :raises UsageError: it is not an address.
    """
    try:
        return Address.parse(text, DEFAULT_FRONTEND)
    except ValueError as error:
        raise UsageError(f"--http {text!r}: {error}") from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``dynamo-worker frontend``."""
    result = argparse.ArgumentParser(
        prog="dynamo-worker frontend",
        description="Serve an OpenAI-compatible HTTP API for the workers found in discovery, with request migration.",
        allow_abbrev=False,
    )
    for option in FRONTEND_OPTIONS:
        # An empty variable counts as unset.
        given = os.environ.get(option.env) or None if option.env else None
        result.add_argument(
            option.flag,
            default=option.default if given is None else given,
            type=_checked(option, given),
            metavar=option.placeholder,
            help=option.summary.replace("%", "%%"),
        )
    return result


def _checked(option: Option, given: str | None) -> Callable[[str], object]:
    """Return the ``type`` of an argument, which argparse calls for a default from the environment too.

    :param given: the value of the option's environment variable, or None.
    """

    def check(text: str) -> object:
        try:
            return option.parse(text)
        except ValueError as error:
            source = f" (from {option.env})" if text is given else ""
            raise argparse.ArgumentTypeError(f"{error}, got {text!r}{source}") from None

    return check


def _drain_seconds() -> float:
    """Return the time limit for requests in flight at shutdown.

    :raises UsageError: its variable is not a number of seconds.
    """
    text = os.environ.get(DRAIN_VARIABLE) or _DRAIN_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MOST_DRAIN_SECONDS:
        raise UsageError(f"{DRAIN_VARIABLE}={text}: expected a number of seconds between 0 and {_MOST_DRAIN_SECONDS}")
    return seconds


def main(argv: list[str]) -> int:
    """Run the frontend until SIGTERM or SIGINT.

    :raises StartError: the address is in use.
    :raises UsageError: a variable or the address is invalid, or the discovery directory is unusable.
    :raises ServerUnreachableError: a server does not answer, at the start or for too long afterwards.
    :raises DiscoveryLostError: the runtime shut down by itself.
    """
    worker = os.environ.pop(WORKER_VARIABLE, None)
    # An embedded frontend must never outlive both its worker and the supervisor.
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
    logs.plain_runtime(args.log_format)
    tracing.prepare()
    check_free(address)
    if args.discovery_backend == "file":
        path = writable_directory(Path(args.discovery_path) if args.discovery_path else None)
        os.environ["DYN_FILE_KV"] = str(path)
    # The runtime's own status server would take the worker's port.
    os.environ["DYN_SYSTEM_PORT"] = "-1"
    as_json = args.log_format == "json"
    output = native_output.FrontendOutput(quiet=quiet, as_json=as_json) if quiet or as_json else None
    with contextlib.closing(output) if output is not None else contextlib.nullcontext():
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.run_until_complete(_serve(address, args, drain_seconds, embedded=worker is not None))
    # A normal exit waits a quarter of a second for the runtime's threads.
    os._exit(0)


async def _serve(address: Address, args: argparse.Namespace, drain_seconds: float, *, embedded: bool) -> None:
    # Not earlier: the runtime reads DYN_LOG when it is imported.
    from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

    from dynamo_worker.host.discovery.runtime import connect

    loop = asyncio.get_running_loop()
    lease_ttl = runtime_lease.prepare(args.discovery_outage) if args.discovery_backend == "etcd" else None
    await wait_for_servers(args.discovery_backend, args.request_plane, args.event_plane, args.discovery_timeout)
    if lease_ttl is not None and await runtime_lease.without_gateway(args.discovery_outage):
        lease_ttl = None
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
        if stopped.is_set() and not embedded:  # the kernel and the supervisor both signal an embedded frontend
            os._exit(0)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.ensure_future(run_input(runtime, "http", engine))
    stopping = asyncio.ensure_future(stopped.wait())
    disabling_nagle = asyncio.ensure_future(_disable_nagle(address))
    lost: asyncio.Future[WorkerError] = loop.create_future()
    keeping: asyncio.Task[None] | None = None
    if lease_ttl is not None:
        # Any endpoint knows the id of the runtime's lease; this one is not served.
        lease_id = runtime.endpoint("dynamo.frontend.http").connection_id()
        lease = runtime_lease.RuntimeLease(runtime_lease.gateway(), lease_id, lease_ttl)
        keeper = runtime_lease.LeaseKeeper(lease, lost.set_result, outage=args.discovery_outage)
        keeping = asyncio.ensure_future(keeper.run())
    log.info("Frontend listening", url=f"http://{address}")
    ends: set[asyncio.Future[Any]] = {serving, stopping, lost}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for task in filter(None, (disabling_nagle, keeping)):
        task.cancel()
    by_itself = serving.done()
    if not by_itself:
        deadline = Deadline.after(drain_seconds)
        await asyncio.to_thread(_drain, address, deadline)
        idle_since = time.monotonic()
        runtime.shutdown()
        await asyncio.wait({serving}, timeout=deadline.remaining())
        await tracing.wait_until_sent(idle_since, deadline)
    if serving.done():
        serving.result()
    if lost.done():
        raise lost.result()
    if by_itself:
        raise DiscoveryLostError(
            "the Dynamo runtime shut down unexpectedly: it lost its connection to "
            f"{args.discovery_backend} discovery, or its lease there"
        )


def _drain(address: Address, deadline: Deadline) -> None:
    """Close the port and wait until no request is in flight, while the runtime keeps running.

    The runtime's own drain leaves discovery first: a stream whose worker ends meanwhile could not migrate (measured on
    1.6.1).
    """
    connection = http.client.HTTPConnection(*address, timeout=max(0.1, deadline.within(_QUERY_SECONDS).remaining()))
    path = os.environ.get("DYN_HTTP_SVC_METRICS_PATH") or "/metrics"
    listening = True
    try:
        while not deadline.passed:
            connection.request("GET", path)
            counts = _ACTIVE.findall(connection.getresponse().read().decode("utf-8", "replace"))
            if listening:
                # This connection, and so every earlier one, has been accepted by now.
                _stop_listening(address)
                listening = False
            elif not any(map(float, counts)):
                return
            else:
                time.sleep(_POLL_SECONDS)
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning("Cannot count requests in flight", error=error)
    finally:
        connection.close()


def _stop_listening(address: Address) -> None:
    """Replace the runtime's listening socket, which the runtime itself cannot close early.

    The runtime keeps its descriptor, which now refers to a socket without clients.
    """
    with socket.socket(socket.AF_UNIX) as unused:
        unused.setblocking(False)
        unused.bind("")  # the kernel picks a name without a file
        unused.listen()
        for descriptor, _ in _listeners(address):
            os.dup2(unused.fileno(), descriptor, inheritable=False)


async def _disable_nagle(address: Address) -> None:
    """Set TCP_NODELAY on the runtime's listening socket, from which connections inherit it.

    With Nagle's algorithm, the kernel holds back the next token until the client's delayed acknowledgement (measured on
    1.6.1: 44 ms to the first token instead of 2).
    """
    deadline = Deadline.after(_START_SECONDS)
    found = False
    while not found and not deadline.passed:
        with contextlib.suppress(OSError):  # out of descriptors
            for _, listener in _listeners(address):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found = True
        await asyncio.sleep(_POLL_SECONDS)


def _listeners(address: Address) -> Iterator[tuple[int, socket.socket]]:
    for descriptor, listener in listening_sockets():
        if listener.getsockname()[:2] == tuple(address):
            yield descriptor, listener
