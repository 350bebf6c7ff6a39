"""The Dynamo runtime of a worker: discovery, endpoints, registration and readiness."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dynamo.runtime import DistributedRuntime, Endpoint

from dynamo_worker.address import LOOPBACK, Address, is_ip, is_loopback, is_unspecified
from dynamo_worker.errors import StartError, describe
from dynamo_worker.host.discovery import model_card, runtime_lease, topology
from dynamo_worker.host.discovery.discovery_directory import writable_directory
from dynamo_worker.host.discovery.etcd_store import EtcdStore
from dynamo_worker.host.discovery.file_store import FileStore
from dynamo_worker.host.discovery.kubernetes_store import KubernetesStore
from dynamo_worker.host.discovery.publishers import OwnPublishers
from dynamo_worker.host.discovery.registration import Registration
from dynamo_worker.host.discovery.servers import wait_for_servers
from dynamo_worker.host.discovery.worker_discovery import WorkerDiscovery
from dynamo_worker.host.listening import keep_on_loopback, listening_ports
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import kubernetes, ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from dynamo_worker.engine import EndpointSpec, EngineInfo
    from dynamo_worker.errors import WorkerError
    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.discovery.store import Store
    from dynamo_worker.host.requests.serving import Handler

log = get_logger(__name__)

_REQUESTS_HOST = "DYN_TCP_RPC_HOST"
_EVENTS_HOST = "DYN_EVENT_PLANE_HOST"
#: Where other processes reach the runtime's parts: requests, the answers to them, events.
_HOSTS = (_REQUESTS_HOST, "DYN_TCP_RESPONSE_STREAM_HOST", _EVENTS_HOST)
#: Seconds for the runtime's own drain. It must never outlast ours, and starts once nothing is in flight.
_RUNTIME_DRAIN_SECONDS = 2
#: Seconds for a server to answer after it has refused something.
_ANSWER_SECONDS = 2.0


def stay_on_loopback() -> bool:
    """Have the runtimes of this process and its children listen on loopback, unless the operator set other hosts.

    :returns: whether requests can come from this machine only.
    """
    for name in _HOSTS:
        if not os.environ.get(name):
            os.environ[name] = LOOPBACK
    return is_loopback(os.environ[_REQUESTS_HOST])


def connect(discovery_backend: str, request_plane: str, event_plane: str | None) -> DistributedRuntime:
    """Start the Dynamo runtime in the running event loop.

    :raises StartError: the runtime refuses to start.
    """
    try:
        return DistributedRuntime(asyncio.get_running_loop(), discovery_backend, request_plane, event_plane=event_plane)
    except Exception as error:
        raise StartError(f"the Dynamo runtime cannot start: {error}") from error
    except BaseException as error:  # a panic: the runtime takes threads and descriptors for granted
        raise StartError(
            f"the Dynamo runtime cannot start: {describe(error)}",
            hint="raise the limits of this process: descriptors (ulimit -n), threads (ulimit -u, pids.max), memory",
        ) from error


async def _wait_for_servers(settings: WorkerSettings, seconds: float) -> None:
    await wait_for_servers(settings.discovery_backend, settings.request_plane, settings.event_plane, seconds)


class Runtime:
    """One worker's connection to the cluster."""

    def __init__(
        self,
        runtime: DistributedRuntime,
        settings: WorkerSettings,
        status_port: int | None,
        lease_ttl: int = 0,
        topology: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._runtime = runtime
        self._topology = topology
        self._settings = settings
        #: Life of the runtime's lease in etcd, in seconds; 0 if only the runtime can look after it.
        self._lease_ttl = lease_ttl
        self._endpoints: dict[str, Endpoint] = {}
        self._serving: set[asyncio.Task[None]] = set()
        #: How many models are in discovery, adapters included.
        self._models = 0
        self._registration: Registration | None = None
        self._record: Callable[[list[str]], None] | None = None
        #: What the engine may change of these entries while it serves.
        self.discovery = WorkerDiscovery(self.endpoint(settings.endpoint), self._entry(settings.endpoint))
        #: Port of the runtime's own status server; None if it is off.
        self.status_port = status_port
        #: Port of the worker's status server, which models are registered with; None if it is off.
        self.public_status_port: int | None = None

    @classmethod
    async def create(cls, settings: WorkerSettings) -> Runtime:
        """Connect to discovery and start the runtime.

        :raises StartError: a server that it needs cannot be reached within ``discovery_timeout``, or the deployment
            does not say where this worker is although it should.
        :raises UsageError: the discovery directory cannot be written or is not safe.
        """
        lease_ttl = runtime_lease.prepare(settings.discovery_outage) if settings.discovery_backend == "etcd" else 0
        await _wait_for_servers(settings, settings.discovery_timeout)
        where = await topology.read()
        if lease_ttl and await runtime_lease.without_gateway(settings.etcd_lease_ttl):
            lease_ttl = 0
        environment = {
            "DYN_SYSTEM_HOST": _status_host(settings),
            # The runtime's status server answers /live and /health alike, and reads its port as a signed 16-bit
            # number. Ours stands in front of it (status_server.py), so it may use any port.
            "DYN_SYSTEM_PORT": "-1" if settings.system_port < 0 else "0",
            "DYN_SYSTEM_STARTING_HEALTH_STATUS": "notready",
            "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": str(_RUNTIME_DRAIN_SECONDS),
        }
        if settings.discovery_backend == "file":
            environment["DYN_FILE_KV"] = str(writable_directory(settings.discovery_path))
        os.environ.update(environment)
        # One runtime thread costs a quarter less CPU per token than the default of one for each processor, which wake
        # each other for every chunk (measured, see docs/design.md).
        os.environ.setdefault("DYN_RUNTIME_NUM_WORKER_THREADS", "1")
        if settings.system_port < 0:
            # Without a status server frontends cannot read the model's files from it; the runtime would warn.
            os.environ.setdefault("DYN_SELF_HOST_METADATA", "0")
        before = listening_ports()  # the runtime does not report the port of its status server
        with _without_lora_routes():
            runtime = connect(settings.discovery_backend, settings.request_plane, settings.event_plane)
        status_port = None
        if settings.system_port >= 0:
            started = sorted(listening_ports() - before)
            if not started:
                raise StartError(f"the runtime's status server is not listening on {_status_host(settings)}")
            status_port = started[0]
        return cls(runtime, settings, status_port, lease_ttl, where)

    @property
    def status_host(self) -> str:
        """Where the runtime's own status server listens."""
        return _status_host(self._settings)

    @property
    def worker_id(self) -> int:
        """The instance id of this worker, unique in the cluster; with etcd it is the id of its lease."""
        return self.endpoint(self._settings.endpoint).connection_id()

    def endpoint(self, name: str) -> Endpoint:
        """Return the endpoint ``namespace.component.name``."""
        if name not in self._endpoints:
            path = f"{self._settings.namespace}.{self._settings.component}.{name}"
            self._endpoints[name] = self._runtime.endpoint(path)
        return self._endpoints[name]

    def _entry(self, name: str) -> str:
        """Return the name of an endpoint in discovery."""
        return f"{self._settings.namespace}/{self._settings.component}/{name}"

    def record_registration(self, run_dir: Path) -> None:
        """Record where this worker is registered, for a supervisor that has to withdraw it in the worker's place."""
        backend = self._settings.discovery_backend
        root = os.environ["DYN_FILE_KV"] if backend == "file" else None

        def record(publishers: list[str]) -> None:
            ledger.record_registration(run_dir, backend, self.worker_id, root=root, publishers=publishers)

        record([])
        self._record = record

    def serve(self, spec: EndpointSpec, handler: Handler) -> asyncio.Task[None]:
        """Serve one endpoint and return the task that ends when the runtime has shut down."""

        async def serve() -> None:
            # No health_check_payload: with one the runtime takes the endpoint's own status for the worker's and
            # ignores set_health_status.
            await self.endpoint(spec.name).serve_endpoint(
                handler, graceful_shutdown=spec.graceful_shutdown, metrics_labels=list(spec.metrics_labels) or None
            )

        if spec.name != self._settings.endpoint:
            self.discovery.add(self.endpoint(spec.name), self._entry(spec.name))
        task = asyncio.ensure_future(serve())
        self._serving.add(task)
        return task

    def completed(self, info: EngineInfo) -> EngineInfo:
        """Return the information to register: the engine's, completed by the worker's flags."""
        port = self.public_status_port
        address = None if port is None else _published(self._settings.system_host, port)
        return model_card.completed(info, self._settings, self._topology, address)

    async def await_discovery(self) -> None:
        """Wait until discovery can take entries of this worker: it may have gone away while the engine started.

        :raises ServerUnreachableError: it does not answer within ``discovery_timeout``.
        """
        await _wait_for_servers(self._settings, self._settings.discovery_timeout)
        if self._settings.discovery_backend == "etcd" and self._lease_ttl:
            lease = runtime_lease.RuntimeLease(runtime_lease.gateway(), self.worker_id, self._lease_ttl)
            with contextlib.suppress(OSError):  # it has gone away again, as the registration will find out
                await asyncio.to_thread(lease.ensure)

    async def register(self, info: EngineInfo, *, endpoint: str) -> None:
        """Make the model known to frontends.

        :raises ServerUnreachableError: discovery does not answer any more.
        :raises StartError: the model's directory has no configuration or tokenizer, the chat template cannot be read,
            or discovery refuses it.
        """
        if info.model_path is None:
            return
        info = self.completed(info)
        try:
            self._models += await model_card.register(self.endpoint(endpoint), info, self._settings)
        except StartError:
            await _wait_for_servers(self._settings, _ANSWER_SECONDS)  # if they are away, they are the reason
            raise
        self.discovery.model = info

    async def watch_registration(self, on_fatal: Callable[[WorkerError], None]) -> Registration | None:
        """Wait until all entries of this worker are in discovery, and return the object that keeps them there.

        :returns: None if this kind of discovery needs or allows no watching.
        """
        store: Store | None = None
        if self._settings.discovery_backend == "file":
            publishers = None if self._record is None else OwnPublishers(self._record)
            store = FileStore(os.environ["DYN_FILE_KV"], f"{self.worker_id:x}", publishers)
        elif self._settings.discovery_backend == "etcd" and self._lease_ttl:
            store = EtcdStore(
                runtime_lease.gateway(),
                self.worker_id,
                ttl=math.ceil(self._settings.etcd_lease_ttl),
                runtime_ttl=self._lease_ttl,
            )
        elif self._settings.discovery_backend == "kubernetes" and kubernetes.in_cluster():
            store = KubernetesStore()
        if store is None:
            return None
        timeout, outage = self._settings.discovery_timeout, self._settings.discovery_outage
        if isinstance(store, KubernetesStore):
            outage = math.inf  # no lease ends, and a restart would only have to wait for the same server
        self._registration = Registration(store, on_fatal, timeout=timeout, outage=outage)
        self.discovery.registration = self._registration
        count = len(self._serving) + self._models
        if not await self._registration.entered(count):
            log.warning("Not all of the worker's entries are in discovery yet", expected=count, known=store.count)
        return self._registration

    @property
    def problem(self) -> str | None:
        """Why the worker is out of discovery although it did not leave; None if it is not."""
        return self._registration.problem if self._registration is not None else None

    async def unregister(self) -> bool:
        """Remove all endpoints, and the model with them, from discovery; return whether all are gone."""
        self.discovery.close()
        if self._registration is not None:
            await self._registration.close()
        present = {
            name: endpoint
            for name, endpoint in self._endpoints.items()
            if not self.discovery.withdrawn(self._entry(name))
        }
        results = await asyncio.gather(
            *(endpoint.unregister_endpoint_instance() for endpoint in present.values()), return_exceptions=True
        )
        failed = False
        for name, result in zip(present, results, strict=True):
            if isinstance(result, BaseException):
                failed = True
                log.warning("Cannot unregister endpoint", endpoint=name, error=result)
        return not failed

    def close_to_others(self, earlier_ports: set[int]) -> None:
        """Close the ports of event publishers to other machines, if subscribers are given a loopback address.

        The runtime's publishers listen on all interfaces, whatever address they announce (1.6.1).

        :param earlier_ports: the ports that this process listened on before the publishers existed.
        """
        if not is_loopback(os.environ.get(_EVENTS_HOST, "")):
            return
        try:
            ports = keep_on_loopback(earlier_ports)
        except OSError as error:
            log.warning("Other machines can read this worker's events", error=error)
        else:
            if ports:
                log.debug("Events are restricted to this machine", ports=len(ports))

    def set_ready(self, ready: bool) -> None:
        """Set the runtime's readiness, which ``/health`` reports."""
        self._runtime.set_health_status(ready)

    def expose_metrics(self, exposition: Any, *, endpoint: str) -> None:
        """Add the text that ``exposition()`` returns to ``/metrics``."""
        self.endpoint(endpoint).metrics.register_prometheus_expfmt_callback(exposition)

    async def shutdown(self, timeout: float) -> None:
        """Shut the runtime down and wait at most ``timeout`` seconds for its endpoints to close."""
        self._runtime.shutdown()
        if self._serving:
            _, pending = await asyncio.wait(self._serving, timeout=timeout)
            if pending:
                log.warning("Endpoints still open", endpoints=len(pending), waited_s=timeout)
        if self._registration is not None:
            await self._registration.release()


def _status_host(settings: WorkerSettings) -> str:
    """Return where the runtime's own status server listens: on loopback, unless other machines must reach it.

    It has no control routes, but frontends on other machines read the model's tokenizer and configuration from it.
    """
    read_from_disk = os.environ.get("DYN_SELF_HOST_METADATA", "").strip().lower() in ("0", "false", "no", "off")
    if read_from_disk or settings.on_loopback:
        return LOOPBACK
    return settings.system_host


def _published(host: str, port: int) -> str:
    """Return the address of the worker's status server for discovery; ``:PORT`` if only readers can tell the host.

    One that listens everywhere is reached where requests are.
    """
    if is_unspecified(host):
        host = os.environ.get(_REQUESTS_HOST, "")
        if not is_ip(host) or is_unspecified(host):
            return f":{port}"
    return str(Address(host, port))


@contextlib.contextmanager
def _without_lora_routes() -> Iterator[None]:
    """Keep the runtime from opening ``/v1/loras``, where anybody could load and unload adapters."""
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
