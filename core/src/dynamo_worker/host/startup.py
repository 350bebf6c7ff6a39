"""Starting a worker, step by step, until it is ready for requests."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker import __version__
from dynamo_worker.address import Address
from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.engine import (
    EndpointSpec,
    Engine,
    EngineContext,
    EngineInfo,
    HasCanary,
    HasControlRoutes,
    HasMetrics,
    PublishesEvents,
)
from dynamo_worker.errors import StartError, describe
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.discovery.discovery_directory import writable_directory
from dynamo_worker.host.discovery.model_card import check_endpoint_types
from dynamo_worker.host.discovery.runtime import Runtime, stay_on_loopback
from dynamo_worker.host.frontend.embedded_frontend import EmbeddedFrontend
from dynamo_worker.host.frontend.frontend_process import FrontendProcess
from dynamo_worker.host.listening import listening_ports
from dynamo_worker.host.monitors.threads import require_thread
from dynamo_worker.host.parts import ReadyWorker
from dynamo_worker.host.requested_drain import RequestedDrain
from dynamo_worker.host.requests.canary import Canary
from dynamo_worker.host.requests.engine_checks import EngineChecks
from dynamo_worker.host.requests.kinds import kind_of, require_router
from dynamo_worker.host.requests.serving import RequestHandler
from dynamo_worker.host.status.control_routes import ControlAccess, read_token
from dynamo_worker.host.status.drain_routes import drain_routes
from dynamo_worker.host.status.model_taints import taint_routes
from dynamo_worker.host.status.scrape import Scrape
from dynamo_worker.host.status.status_server import StatusServer
from dynamo_worker.lifecycle import State
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.last_exit import last_exit
from dynamo_worker.supervisor.protocol import RUN_DIR, STATUS_SERVER
from dynamo_worker.supervisor.record_file import default_directory
from dynamo_worker.supervisor.run_directory import RunDirectory

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.discovery.registration import Registration
    from dynamo_worker.host.drain_phase import DrainPhase
    from dynamo_worker.host.parts import WorkerParts
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.host.requests.kinds import RequestKind
    from dynamo_worker.host.supervisor_channel import SupervisorChannel

log = get_logger(__name__)


@dataclass(frozen=True)
class Callbacks:
    """How the parts of a worker read its state and report events to its state machine.

    :param state: returns the current state.
    :param on_fatal: called with an error that ends the worker.
    :param on_found_dead: called when a request finds the engine dead.
    :param on_endpoint_closed: called when an endpoint has ended, with its name and its task.
    :param on_drain_phase: called with each new phase of a drain that the operator requests.
    """

    state: Callable[[], State]
    on_fatal: Callable[[BaseException], None]
    on_found_dead: Callable[[BaseException], None]
    on_endpoint_closed: Callable[[str, asyncio.Task[None]], None]
    on_drain_phase: Callable[[DrainPhase], None]


class Startup:
    """Starts one worker; every part enters :class:`WorkerParts` as soon as it exists and needs to be released."""

    def __init__(
        self,
        settings: WorkerSettings,
        plugins: Plugins,
        engine_args: Any,
        parts: WorkerParts,
        callbacks: Callbacks,
        control: SupervisorChannel,
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._engine_args = engine_args
        self._parts = parts
        self._callbacks = callbacks
        self._control = control
        self._checks = EngineChecks(plugins.engine)
        self._status_port: int | None = None

    async def run(self) -> ReadyWorker:
        """Start everything, and return once the worker is ready.

        :raises StartError: a part cannot be started on this machine.
        :raises UsageError: the settings or the engine's arguments are wrong.
        """
        await self._start_status_server()
        self._show_last_exit()
        private_dir = self._private_directory()
        self._start_frontend(private_dir)
        with self._step("runtime"):
            runtime = await self._start_runtime()
        with self._step("engine"):
            engine = self._create_engine(runtime, private_dir)
            info = await self._start_engine(engine, runtime)
        kind = kind_of(runtime.completed(info), self._checks)
        require_router(info, self._settings.router_mode)
        self._adapt_drain(kind)
        with self._step("warm-up"):
            await self._warm_up(engine, info, kind)
        require_thread()
        _freeze_garbage()
        self._parts.egress.start()
        earlier_ports = listening_ports()
        if isinstance(engine, PublishesEvents):
            await engine.attach(runtime.endpoint(self._settings.endpoint), runtime.completed(info))
        runtime.record_registration(private_dir)
        with self._step("registration"):
            registration = await self._serve_endpoints(engine, runtime, info, kind)
        self._offer_metrics_and_control_routes(engine, runtime, info)
        with self._step("frontend"):
            await self._wait_for_frontend(runtime.completed(info))
        # Not earlier: the runtime opens the port of a publisher some time after the publisher was created.
        runtime.close_to_others(earlier_ports)
        runtime.set_ready(True)
        self._report_ready(runtime, info)
        return ReadyWorker(engine, runtime.completed(info), registration, self._settings)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Tell the supervisor's flight recorder how long a step took, and how it failed."""
        started = time.monotonic()
        error: str | None = None
        try:
            yield
        except BaseException as raised:
            error = describe(raised)
            raise
        finally:
            self._control.send("step", name=name, seconds=round(time.monotonic() - started, 3), error=error)

    async def _start_status_server(self) -> None:
        """Answer probes from the first moment on."""
        settings, parts = self._settings, self._parts
        if settings.system_port < 0:
            return
        status = parts.status = StatusServer(
            self._callbacks.state,
            live_path=os.environ.get("DYN_SYSTEM_LIVE_PATH", "/live"),
            health_path=os.environ.get("DYN_SYSTEM_HEALTH_PATH", "/health"),
            problem=self._problem,
            access=ControlAccess(read_token(settings.control_token_file)),
        )
        # Without heartbeats only the probe can find a worker that is blocked for good.
        hand_over = self._hand_over_listener if settings.heartbeat_timeout else None
        self._status_port = port = await status.start(settings.system_host, settings.system_port, hand_over)
        log.info("Status server listening", url=f"http://{Address(settings.system_host, port)}")

    def _hand_over_listener(self, listener: int, end: int, live_path: str) -> bool:
        return self._control.hand_over(STATUS_SERVER, [listener, end], live_path=live_path)

    def _problem(self) -> str | None:
        """Return why the serving worker is not ready; None if it is."""
        parts = self._parts
        drained = None if parts.requested_drain is None else parts.requested_drain.problem
        return drained or (None if parts.runtime is None else parts.runtime.problem)

    def _show_last_exit(self) -> None:
        settings = self._settings
        directory = default_directory(os.environ) if settings.record_dir is None else str(settings.record_dir)
        last = last_exit(directory) if directory is not None and settings.record_keep else None
        if last is not None:
            self._parts.metrics.set_last_exit(last)

    def _private_directory(self) -> Path:
        """Return the supervisor's private directory or, without a supervisor, create one.

        :raises StartError: there is no safe place for it.
        """
        given = os.environ.get(RUN_DIR)
        if given and self._control.supervised:  # without a supervisor it may be inherited from another worker
            return Path(given)
        try:
            directory = self._parts.own_directory = RunDirectory.create()
        except OSError as error:
            raise StartError(f"cannot create the worker's private directory: {error.strerror}") from error
        if directory.trouble:
            log.warning("TMPDIR cannot be used as it is", used=directory.base, reason="; ".join(directory.trouble))
        return Path(directory.path)

    def _start_frontend(self, private_dir: Path) -> None:
        """Start the frontend beside the worker; with file discovery both meet in the private directory."""
        settings = self._settings
        if settings.frontend is None:
            return
        if settings.on_loopback and stay_on_loopback() and settings.discovery_backend != "file":
            log.warning(
                "All frontends will discover this worker, but only those on this machine can reach it",
                discovery=settings.discovery_backend,
                next="set DYN_TCP_RPC_HOST, or give --frontend an address that other machines can reach",
            )
        path = settings.discovery_path
        if path is None and settings.discovery_backend == "file":
            path = private_dir / "discovery"
        if path is not None:
            path = writable_directory(path)
            self._settings = settings = settings.model_copy(update={"discovery_path": path})
        process = FrontendProcess.start(settings, path, private_dir)
        self._parts.frontend = EmbeddedFrontend(process, self._parts.monitors, self._callbacks.on_fatal)

    async def _start_runtime(self) -> Runtime:
        runtime = self._parts.runtime = await Runtime.create(self._settings)
        if self._parts.status is not None and runtime.status_port is not None:
            self._parts.status.forward_to(runtime.status_host, runtime.status_port)
            runtime.public_status_port = self._status_port
        return runtime

    def _create_engine(self, runtime: Runtime, private_dir: Path) -> Engine:
        settings = self._settings
        context = EngineContext(
            component=f"{settings.namespace}.{settings.component}",
            private_dir=private_dir,
            supervised=self._control.supervised,
            allowed_paths=AllowedPaths(settings.control_load_root, settings.control_write_root),
            events_wanted=settings.events_wanted,
            discovery=runtime.discovery,
        )
        self._plugins.configure(self._engine_args, context)
        engine = self._plugins.create_engine(self._engine_args, context)
        self._checks.methods(engine)
        self._parts.engine = engine
        return engine

    async def _start_engine(self, engine: Engine, runtime: Runtime) -> EngineInfo:
        info = await self._checks.started(engine.start(runtime.worker_id))
        check_endpoint_types(info, self._settings, self._checks.problem)
        self._parts.processes.watch(self._checks.pids(engine.processes()), "engine process")
        return info

    def _adapt_drain(self, kind: RequestKind) -> None:
        """Let requests finish that ``--drain handoff`` would end with an error, as no frontend continues them."""
        self._parts.requests.migrate = kind.migrates
        settings = self._settings
        if not kind.migrates and settings.drain is DrainMode.HANDOFF:
            self._settings = settings.without_handoff()
            log.warning(
                "Requests cannot be handed off: frontends send no request of this kind to a second worker",
                kind=kind.name,
                drain=self._settings.drain,
                grace_s=self._settings.grace_period,
            )

    async def _warm_up(self, engine: Engine, info: EngineInfo, kind: RequestKind) -> None:
        settings = self._settings
        if not settings.warmup or info.model_path is None:
            return
        if not isinstance(engine, HasCanary):
            log.warning("No warm-up and no stall detection: the engine has no canary request")
            return
        canary = Canary(engine, engine.canary_request, self._parts.requests)
        await canary.warm_up(self._checks, kind, settings.warmup_timeout)

    async def _serve_endpoints(
        self, engine: Engine, runtime: Runtime, info: EngineInfo, kind: RequestKind
    ) -> Registration | None:
        """Serve the endpoints, register the model, and return the object that keeps both in discovery."""
        parts = self._parts
        handler = RequestHandler(engine, parts.requests, parts.egress, self._callbacks.on_found_dead, kind)
        endpoints = self._endpoints(info)
        for spec in endpoints:
            task = runtime.serve(spec, handler.handler(spec))
            task.add_done_callback(partial(self._callbacks.on_endpoint_closed, spec.name))
        for spec in endpoints:
            if spec.registers_model:
                await runtime.register(info, endpoint=spec.name)
        return await runtime.watch_registration(self._callbacks.on_fatal)

    def _endpoints(self, info: EngineInfo) -> list[EndpointSpec]:
        """Return the endpoints to serve; a worker without a model (a headless rank) serves only the engine's own."""
        if info.model_path is None:
            return list(info.endpoints)
        labels = _model_labels(info)
        return [EndpointSpec(self._settings.endpoint, metrics_labels=labels, registers_model=True), *info.endpoints]

    def _offer_metrics_and_control_routes(self, engine: Engine, runtime: Runtime, info: EngineInfo) -> None:
        parts, settings = self._parts, self._settings
        if isinstance(engine, HasMetrics):
            labels = {
                "dynamo_namespace": settings.namespace,
                "dynamo_component": settings.component,
                "dynamo_endpoint": settings.endpoint,
                "worker_id": f"{runtime.worker_id:x}",
                **dict(_model_labels(info)),
            }
            parts.metrics.add_registry(engine.metrics_registry(), labels)
        scrape = Scrape(parts.metrics.exposition)
        if parts.status is not None:
            routes = engine.control_routes() if isinstance(engine, HasControlRoutes) else {}
            own = {
                **drain_routes(self._requested_drain(engine, runtime), settings, handoff=parts.requests.migrate),
                **taint_routes(runtime.discovery.set_taints),
            }
            parts.status.serve_routes({**self._checks.mapping("control_routes", routes), **own})
            parts.status.serve_metrics(scrape)
        runtime.expose_metrics(scrape.text, endpoint=settings.endpoint)

    def _requested_drain(self, engine: Engine, runtime: Runtime) -> RequestedDrain:
        parts, callbacks = self._parts, self._callbacks
        parts.requested_drain = RequestedDrain(
            engine,
            runtime,
            parts.requests,
            self._plugins,
            state=callbacks.state,
            on_phase=callbacks.on_drain_phase,
        )
        return parts.requested_drain

    async def _wait_for_frontend(self, info: EngineInfo) -> None:
        if self._parts.frontend is not None:
            await self._parts.frontend.wait_ready(info)

    def _report_ready(self, runtime: Runtime, info: EngineInfo) -> None:
        settings, frontend = self._settings, self._parts.frontend
        seconds = linux.age(os.getpid()) or 0.0  # with the imports, which take seconds
        metrics = self._parts.metrics
        metrics.start_seconds.set(seconds)
        metrics.set_info(
            version=__version__, engine=settings.engine, model=info.model_name, dynamo_namespace=settings.namespace,
            dynamo_component=settings.component, worker_id=f"{runtime.worker_id:x}",
        )  # fmt: skip
        metrics.ready.set_function(lambda: self._callbacks.state() is State.SERVING and self._problem() is None)
        self._control.send("ready", model=info.model_name, instance=f"{runtime.worker_id:x}", seconds=round(seconds, 3))
        log.info(
            "Worker ready",
            model=info.model_name,
            endpoint=f"{settings.namespace}.{settings.component}.{settings.endpoint}",
            instance=f"{runtime.worker_id:x}",
            start_s=seconds,
        )
        if frontend is not None:
            # Part of the message, not a field: a field would be quoted, and this line is there to be copied.
            if info.embeddings is None:
                path, prompt = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
            else:
                path, prompt = "embeddings", '"input": "Hello!"'
            header = "-H 'content-type: application/json'"
            hint = f'Try it: curl {frontend.url}/v1/{path} {header} -d \'{{"model": "{info.model_name}", {prompt}}}\''
            log.info(hint)


def _model_labels(info: EngineInfo) -> tuple[tuple[str, str], ...]:
    """Return the labels that name the model, both that of OpenAI's APIs and that of engines."""
    return (("model", info.model_name), ("model_name", info.model_name))


def _freeze_garbage() -> None:
    """Exempt everything created so far from garbage collection: it lives as long as the worker."""
    gc.collect()
    gc.freeze()
