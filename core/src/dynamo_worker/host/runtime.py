"""The Dynamo runtime: discovery, endpoints, registration, health. The only module that creates it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dynamo.runtime import DistributedRuntime, Endpoint

from dynamo_worker.address import LOOPBACK, is_loopback
from dynamo_worker.errors import StartError, UsageError, describe
from dynamo_worker.host import model_card
from dynamo_worker.host.discovery import WorkerDiscovery
from dynamo_worker.host.listening import keep_on_loopback, listening_ports
from dynamo_worker.host.registration import EtcdStore, FileStore, Registration
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import ledger
from dynamo_worker.supervisor.discovery import DEFAULT_ETCD, addresses, etcd_endpoints
from dynamo_worker.supervisor.protocol import DEFAULT_FILE_KV
from dynamo_worker.supervisor.safe_place import UnsafePlaceError, check_above, make_directory, real_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dynamo_worker.engine import EndpointSpec, EngineInfo
    from dynamo_worker.errors import WorkerError
    from dynamo_worker.host.registration import Store
    from dynamo_worker.host.serving import Handler
    from dynamo_worker.host.settings import WorkerSettings

log = get_logger(__name__)

_REQUESTS_HOST = "DYN_TCP_RPC_HOST"
_EVENTS_HOST = "DYN_EVENT_PLANE_HOST"
#: Where the runtime looks when ``NATS_SERVER`` is not set.
_DEFAULT_NATS = "nats://localhost:4222"
#: Where the runtime's parts can be reached: requests, the answers to them, events.
_HOSTS = (_REQUESTS_HOST, "DYN_TCP_RESPONSE_STREAM_HOST", _EVENTS_HOST)
#: How the names begin of what lies in a discovery directory: the runtime's buckets, its drafts and ours.
_OF_DISCOVERY = ("v1", ".tmp_")
#: How long one attempt to connect to a server may take, in seconds.
_CONNECT_SECONDS = 2.0
#: The runtime's own way of ending endpoints must never outlast ours; it is only asked once nothing is in flight.
_RUNTIME_DRAIN_SECONDS = 2


def stay_on_loopback() -> bool:
    """Have this process's runtime, and those of its children, listen on loopback where nobody has said otherwise.

    :returns: whether requests come from this machine only.
    """
    for name in _HOSTS:
        if not os.environ.get(name):
            os.environ[name] = LOOPBACK
    return is_loopback(os.environ[_REQUESTS_HOST])


def connect(discovery_backend: str, request_plane: str, event_plane: str | None) -> DistributedRuntime:
    """Start the Dynamo runtime in the running event loop.

    :raises StartError: it does not start.
    """
    try:
        return DistributedRuntime(asyncio.get_running_loop(), discovery_backend, request_plane, event_plane=event_plane)
    except Exception as error:
        raise StartError(f"the Dynamo runtime does not start: {error}") from error
    except BaseException as error:  # a panic: it takes threads and descriptors for granted
        raise StartError(
            f"the Dynamo runtime does not start: {describe(error)}",
            hint="raise the limits of this process: descriptors (ulimit -n), threads (ulimit -u, pids.max), memory",
        ) from error


class Runtime:
    """One worker's view of the cluster."""

    def __init__(self, runtime: DistributedRuntime, settings: WorkerSettings, status_port: int | None) -> None:
        self._runtime = runtime
        self._settings = settings
        self._endpoints: dict[str, Endpoint] = {}
        self._serving: set[asyncio.Task[None]] = set()
        #: How many models, adapters among them, are in discovery.
        self._models = 0
        self._registration: Registration | None = None
        #: What the engine may do with these entries while it serves.
        self.discovery = WorkerDiscovery(self.endpoint(settings.endpoint))
        #: Port of the runtime's own status server, None if that is off.
        self.status_port = status_port

    @classmethod
    async def create(cls, settings: WorkerSettings) -> Runtime:
        """Connect to discovery and start the runtime.

        :raises StartError: a server it needs cannot be reached within ``discovery_timeout``.
        :raises UsageError: discovery is to be kept in a directory that cannot be written.
        """
        await _wait_for_servers(settings)
        environment = {
            "DYN_SYSTEM_HOST": _status_host(settings),
            # The status server of the runtime answers /live and /health alike and reads its port as a signed 16-bit
            # number. Ours stands in front of it (status_server.py), so it may take any port.
            "DYN_SYSTEM_PORT": "-1" if settings.system_port < 0 else "0",
            "DYN_SYSTEM_STARTING_HEALTH_STATUS": "notready",
            "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": str(_RUNTIME_DRAIN_SECONDS),
        }
        if settings.discovery_backend == "file":
            environment["DYN_FILE_KV"] = str(writable_directory(settings.discovery_path))
        os.environ.update(environment)
        # One thread of the runtime's own costs a quarter less CPU per token than its default of one for each processor,
        # which wake each other for every chunk (measured, see docs/design.md).
        os.environ.setdefault("DYN_RUNTIME_NUM_WORKER_THREADS", "1")
        if settings.system_port < 0:
            # Without a status server the model's files cannot come from it; the runtime would warn about that.
            os.environ.setdefault("DYN_SELF_HOST_METADATA", "0")
        before = listening_ports()  # the runtime does not tell which one its status server takes
        with _without_lora_routes():
            runtime = connect(settings.discovery_backend, settings.request_plane, settings.event_plane)
        status_port = None
        if settings.system_port >= 0:
            started = sorted(listening_ports() - before)
            if not started:
                raise StartError(f"the runtime's status server does not listen on {_status_host(settings)}")
            status_port = started[0]
        return cls(runtime, settings, status_port)

    @property
    def status_host(self) -> str:
        """Where the runtime's own status server listens."""
        return _status_host(self._settings)

    @property
    def worker_id(self) -> int:
        """The instance id of this worker, unique in the cluster. With etcd it is the id of its lease."""
        return self.endpoint(self._settings.endpoint).connection_id()

    def endpoint(self, name: str) -> Endpoint:
        """Return the endpoint ``namespace.component.name``."""
        if name not in self._endpoints:
            path = f"{self._settings.namespace}.{self._settings.component}.{name}"
            self._endpoints[name] = self._runtime.endpoint(path)
        return self._endpoints[name]

    def record_registration(self, run_dir: Path | None) -> None:
        """Note where this worker will be found, so that the supervisor can withdraw it if the worker cannot."""
        if run_dir is None:
            return
        backend = self._settings.discovery_backend
        root = os.environ["DYN_FILE_KV"] if backend == "file" else None
        ledger.record_registration(run_dir, backend, self.worker_id, root=root)

    def serve(self, spec: EndpointSpec, handler: Handler) -> asyncio.Task[None]:
        """Serve one endpoint and return the task that ends when the runtime has shut down."""

        async def serve() -> None:
            # The health_check_payload stays unset on purpose: with it the runtime takes the endpoint's own status for
            # the worker's and no longer listens to set_health_status.
            await self.endpoint(spec.name).serve_endpoint(
                handler, graceful_shutdown=spec.graceful_shutdown, metrics_labels=list(spec.metrics_labels) or None
            )

        task = asyncio.ensure_future(serve())
        self._serving.add(task)
        return task

    def completed(self, info: EngineInfo) -> EngineInfo:
        """Return what is registered: the engine's information, and what the worker's flags add to it."""
        return model_card.completed(info, self._settings)

    async def register(self, info: EngineInfo, *, endpoint: str) -> None:
        """Make the model known to frontends.

        :raises StartError: the model's directory has no configuration or tokenizer, the chat template cannot be read,
            or discovery refuses it.
        """
        if info.model_path is None:
            return
        info = self.completed(info)
        self._models += await model_card.register(self.endpoint(endpoint), info, self._settings)
        self.discovery.model = info

    async def watch_registration(self, on_fatal: Callable[[WorkerError], None]) -> Registration | None:
        """Wait until all that this worker serves is in discovery, and return what watches that it stays there.

        :returns: None if nothing can, with this kind of discovery.
        """
        store: Store | None = None
        if self._settings.discovery_backend == "file":
            store = FileStore(os.environ["DYN_FILE_KV"], f"{self.worker_id:x}")
        elif self._settings.discovery_backend == "etcd":
            store = EtcdStore(etcd_endpoints(), self.worker_id)
        if store is None:
            return None
        self._registration = Registration(store, on_fatal, timeout=self._settings.discovery_timeout)
        self.discovery.registration = self._registration
        count = len(self._serving) + self._models
        if not await self._registration.entered(count):
            log.warning("Not all of the worker's entries are in discovery yet", expected=count, known=store.count)
        return self._registration

    @property
    def problem(self) -> str | None:
        """Why the worker is out of discovery without having left it, or None."""
        return self._registration.problem if self._registration is not None else None

    async def unregister(self) -> bool:
        """Take every endpoint, and with it the model, out of discovery; return whether all of them are out."""
        self.discovery.close()
        if self._registration is not None:
            await self._registration.close()
        results = await asyncio.gather(
            *(endpoint.unregister_endpoint_instance() for endpoint in self._endpoints.values()), return_exceptions=True
        )
        failed = False
        for name, result in zip(self._endpoints, results, strict=True):
            if isinstance(result, BaseException):
                failed = True
                log.warning("Endpoint could not be unregistered", endpoint=name, error=result)
        return not failed

    def close_to_others(self, before: set[int]) -> None:
        """Close the ports of event publishers to other machines, if they are told to subscribers as ports of loopback.

        The runtime's publishers listen on all interfaces, whatever address they tell (1.6.1).

        :param before: the ports that were listened on before there were publishers.
        """
        if not is_loopback(os.environ.get(_EVENTS_HOST, "")):
            return
        try:
            ports = keep_on_loopback(before)
        except OSError as error:
            log.warning("Other machines can read this worker's events", error=error)
        else:
            if ports:
                log.debug("Events are for this machine only", ports=len(ports))

    def set_ready(self, ready: bool) -> None:
        """Set what ``/health`` answers."""
        self._runtime.set_health_status(ready)

    def expose_metrics(self, exposition: Any, *, endpoint: str) -> None:
        """Add the text that ``exposition()`` returns to ``/metrics``."""
        self.endpoint(endpoint).metrics.register_prometheus_expfmt_callback(exposition)

    async def shutdown(self, timeout: float) -> None:
        """End the runtime and wait until its endpoints are closed, at most ``timeout`` seconds."""
        self._runtime.shutdown()
        if self._serving:
            _, pending = await asyncio.wait(self._serving, timeout=timeout)
            if pending:
                log.warning("Endpoints still open", endpoints=len(pending), waited_s=timeout)


def writable_directory(path: Path | None) -> Path:
    """Return the directory of the file backend, without links on the way to it, created if it is missing.

    Who may write in it decides where requests go, so it has to be this user's alone. One of ours is closed to others.

    :raises UsageError: it cannot be made, is another user's or used for something else as well, or others can put
        another one in its place.
    """
    directory = path or Path(os.environ.get("DYN_FILE_KV") or DEFAULT_FILE_KV)
    try:
        with contextlib.ExitStack() as opened:
            descriptor = make_directory(str(directory))
            opened.callback(os.close, descriptor)
            real = Path(real_path(descriptor))
            if not os.access(real, os.W_OK | os.X_OK):
                raise UsageError(f"the discovery directory {directory} is not writable", hint="see --discovery-path")
            owner, owner_of_path = os.fstat(descriptor).st_uid, os.lstat(directory).st_uid  # it may be a link
            if owner != os.geteuid() or owner_of_path not in (0, os.geteuid()):
                raise UsageError(
                    f"the discovery directory {directory} belongs to another user "
                    f"({owner if owner != os.geteuid() else owner_of_path}), who could replace workers in it and "
                    "receive their requests",
                    hint="give --discovery-path a directory of your own",
                )
            check_above(descriptor)
            _close_to_others(real, descriptor)
            return real
    except UnsafePlaceError as error:
        raise UsageError(
            f"the discovery directory {directory} is not safe, somebody could put another one in its place: "
            f"{error.words}",
            hint=f"{error.advice}; or " * bool(error.advice) + "give --discovery-path a directory of your own",
        ) from error
    except OSError as error:
        raise UsageError(
            f"the discovery directory {directory} cannot be created: {error.strerror}", hint="see --discovery-path"
        ) from error


def _close_to_others(directory: Path, descriptor: int) -> None:
    """Take everybody else's permissions from a discovery directory of ours.

    Its own mode is not enough: what the runtime makes in it has the mode that the umask says, so that with 002, which
    is usual on clusters, the group may write there.

    :raises UsageError: it is not for discovery alone. ``/tmp`` and ``/`` are root's own, too.
    """
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return
    itself = f"/proc/self/fd/{descriptor}"
    foreign = any(not name.startswith(_OF_DISCOVERY) for name in os.listdir(itself))
    if not mode & (stat.S_IWGRP | stat.S_IWOTH) and (foreign or mode & stat.S_ISVTX):
        return  # nobody else writes in it, and its mode is somebody's business
    if foreign or mode & stat.S_ISVTX:
        raise UsageError(
            f"the discovery directory {directory} is open to others (mode {mode:04o}), and not closed to them, because "
            "it is there for something else as well: they could replace workers in it and receive their requests",
            hint="give --discovery-path a directory of its own",
        )
    with contextlib.suppress(OSError):
        os.chmod(itself, mode & ~(stat.S_IRWXG | stat.S_IRWXO) | stat.S_IRWXU)
    # Some file systems give everything in them one mode: then what the runtime makes has it, too.
    left = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if left & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"the discovery directory {directory} is open to others (mode {left:04o}), and its file system does not "
            "let it be closed to them: they could replace workers in it and receive their requests",
            hint="give --discovery-path a directory on another file system",
        )
    if left != mode:
        log.warning("Discovery directory closed to other users", directory=directory, mode=f"{mode:04o}")


def _status_host(settings: WorkerSettings) -> str:
    """Return where the runtime's own status server listens: on loopback, unless somebody else has to reach it.

    It has no control routes, but frontends elsewhere read the model's tokenizer and configuration from it.
    """
    read_from_disk = os.environ.get("DYN_SELF_HOST_METADATA", "").strip().lower() in ("0", "false", "no", "off")
    if read_from_disk or settings.on_loopback:
        return LOOPBACK
    return settings.system_host


@contextlib.contextmanager
def _without_lora_routes() -> Iterator[None]:
    """Keep the runtime from opening ``/v1/loras``, where everybody could load and unload adapters."""
    name = "DYN_LORA_ENABLED"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _host_and_port(address: str, variable: str, default: str) -> tuple[str, int]:
    """Split one server's address; the port is that of ``default`` if it has none.

    :raises UsageError: it is none.
    """
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        return parts.hostname or "localhost", parts.port or urlsplit(default).port or 0
    except ValueError as error:
        raise UsageError(f"{variable}: {address!r} is no address: {error}") from error


async def _wait_for_servers(settings: WorkerSettings) -> None:
    """Wait until the servers the runtime needs accept connections: it would itself block the event loop for 120 s."""
    needed: list[tuple[str, str, str]] = []
    if settings.discovery_backend == "etcd":
        needed.append(("etcd", "ETCD_ENDPOINTS", DEFAULT_ETCD))
    if "nats" in (settings.request_plane, settings.event_plane):
        needed.append(("NATS", "NATS_SERVER", _DEFAULT_NATS))
    for name, variable, default in needed:
        servers = {address: _host_and_port(address, variable, default) for address in addresses(variable, default)}
        await _wait_for_server(name, variable, servers, settings.discovery_timeout)


async def _wait_for_server(name: str, variable: str, servers: Mapping[str, tuple[str, int]], timeout: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    announced = False
    while True:
        problems = []
        for address, (host, port) in servers.items():
            limit = min(_CONNECT_SECONDS, max(0.05, deadline - loop.time()))
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), limit)
            except (OSError, asyncio.TimeoutError) as error:
                problems.append(f"{address}: {_connection_problem(error)}")
            else:
                writer.close()
                return
        if loop.time() >= deadline:
            raise StartError(
                f"{name} cannot be reached ({'; '.join(problems)}); waited {timeout:g} s",
                hint=f"start it, or set {variable}, or use --discovery-backend file for a single machine",
            )
        if not announced:
            log.warning("Waiting for a server", server=name, tried="; ".join(problems), timeout_s=timeout)
            announced = True
        await asyncio.sleep(min(0.5, max(0.05, deadline - loop.time())))


def _connection_problem(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error)
    return str(error) or type(error).__name__
