"""The worker process: wires settings, plugins, runtime, engine, monitors and lifecycle, and ends with an exit code.

It executes the table in ``lifecycle.py``: every state has one coroutine, every coroutine ends with one event.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from dynamo_worker import __version__, logs
from dynamo_worker.address import Address
from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.containment import contained
from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import (
    Chunk,
    EndpointSpec,
    Engine,
    EngineContext,
    EngineInfo,
    Generate,
    HasCanary,
    HasControlRoutes,
    HasMetrics,
    LocalContext,
    PublishesEvents,
    Request,
    RequestContext,
)
from dynamo_worker.errors import DiscoveryLostError, StartError, WorkerError, describe, shortage
from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.host import native_output
from dynamo_worker.host.control_routes import ControlAccess, read_token
from dynamo_worker.host.crash_report import print_crash
from dynamo_worker.host.drain_progress import DrainProgress
from dynamo_worker.host.egress import Egress
from dynamo_worker.host.engine_checks import AnswerCheck, EngineChecks
from dynamo_worker.host.frontend_process import FRONTEND_ABORT_SECONDS, FrontendProcess
from dynamo_worker.host.listening import listening_ports
from dynamo_worker.host.metrics import WorkerMetrics
from dynamo_worker.host.monitors import (
    NO_THREADS,
    NO_THREADS_HINT,
    FrontendMonitor,
    HealthMonitor,
    Heartbeat,
    ProcessWatch,
    StallMonitor,
    ThreadMonitor,
    can_start_thread,
)
from dynamo_worker.host.runtime import Runtime, stay_on_loopback, writable_directory
from dynamo_worker.host.serving import Cut, RequestHandler, RequestOutcome, RequestRegistry
from dynamo_worker.host.shutdown_plan import ShutdownPlan
from dynamo_worker.host.status_server import StatusServer
from dynamo_worker.host.supervisor_channel import SupervisorChannel
from dynamo_worker.lifecycle import TRANSITIONS, Event, State
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.protocol import FORCED_STOP, RUN_DIR, SIGNAL_DEBOUNCE
from dynamo_worker.supervisor.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from dynamo_worker.host.plugins import Plugins
    from dynamo_worker.host.registration import Registration
    from dynamo_worker.host.settings import WorkerSettings

    Stage = Callable[[], Coroutine[Any, Any, None]]

log = get_logger(__name__)

#: Seconds a worker beyond repair has for leaving discovery; discovery itself may be what failed.
_FATAL_UNREGISTER = 0.5
#: Seconds for the ``on_fatal_error`` hooks.
_LAST_WORDS = 2.0
#: Most seconds for cleaning up after a fatal error; what is left then, the supervisor removes.
_FATAL_CLEANUP = 5.0
#: Seconds that requests which were cut have to send their last message.
_CUT_SECONDS = 1.0
#: Seconds for the runtime to close its connections once nothing is in flight.
_RUNTIME_SHUTDOWN = 3.0
#: Seconds that an error found by a request waits for its cause.
_CAUSE_SECONDS = 0.01
#: Seconds in which a process that has closed its connections is dead, on a machine with too much to do.
_DEATH_SECONDS = 0.1
#: Seconds between the end of the hooks' time and the end of their stage, to cancel, log and go on.
_HOOK_MARGIN = 0.3
#: Seconds that who reads our output has, at the end, to take what is left of it.
_LAST_OUTPUT = 0.5
#: Seconds a start that is cancelled has to give up.
_CANCEL_START = 1.0


def run(settings: WorkerSettings, plugins: Plugins, engine_args: Any) -> int:
    """Run one worker from start to exit; does not return but ends the process with the worker's exit code.

    ``os._exit`` ends it in every case: engines leave threads and ``atexit`` handlers that can hang for minutes, and
    the runtime's threads delay an orderly exit by a quarter of a second (measured). Everything that has to be
    released was released by then, in order and under a deadline.
    """
    faulthandler.enable(all_threads=True)
    # The supervisor asks for the stacks of a worker that hangs; this works while the GIL is held in native code.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    stderr = logs.UnblockedStream(sys.stderr)
    logs.setup(settings.log_level, settings.log_format, stderr)
    native_output.redirect(stderr)
    control = SupervisorChannel.from_environment()
    control.send(
        "settings",
        engine=settings.engine,
        termination_grace_period=settings.termination_grace_period,
        heartbeat_timeout=settings.heartbeat_timeout,
        termination_message_path=str(settings.termination_message_path),
        log_format=settings.log_format,
    )
    launcher = Launcher(settings, plugins, engine_args, control)
    uvloop.install()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    exit_code = _live(loop, launcher)
    control.send("exit", code=exit_code, reason=launcher.reason)
    _flush(stderr)
    os._exit(exit_code)


def _live(loop: asyncio.AbstractEventLoop, launcher: Launcher) -> int:
    """Run a worker's life on the loop and return its exit code, whatever happens in it."""
    life = loop.create_task(launcher.run())
    while True:
        try:
            return loop.run_until_complete(life)
        except BaseException as error:  # noqa: PERF203 - as rare as it gets
            if life.done():
                print_crash(error)
                launcher.reason = f"bug in dynamo-worker: {describe(error)}"
                return ExitCode.FATAL
            # SystemExit and KeyboardInterrupt stop the loop when they leave a task or a callback: one of the engine's
            # own, because ours let none out. The loop goes on from where it was.
            launcher.on_escaped(error)


def _flush(stderr: logs.UnblockedStream) -> None:
    """Write out what waits in buffers; who does not read it, or cannot any more, changes nothing."""
    flushed = threading.Event()

    def flush_stdout() -> None:
        with contextlib.suppress(Exception):  # whatever the engine has put in its place
            sys.stdout.flush()
        flushed.set()

    with contextlib.suppress(RuntimeError, MemoryError):  # no more threads
        # Not `threading.Thread`: its start waits without end for a thread that dies for want of memory.
        _thread.start_new_thread(flush_stdout, ())
        flushed.wait(_LAST_OUTPUT)
    stderr.drain(_LAST_OUTPUT)


class Launcher:
    """One worker's life."""

    def __init__(
        self, settings: WorkerSettings, plugins: Plugins, engine_args: Any, control: SupervisorChannel
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._engine_args = engine_args
        self._control = control
        self._plan = ShutdownPlan.from_settings(settings)
        self._state = State.STARTING
        self._entered = self._created = time.monotonic()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._stage: asyncio.Task[None] | None = None
        self._monitors: list[asyncio.Task[None]] = []
        self._registry = RequestRegistry()
        self._egress = Egress(self._on_fatal, slow_client_timeout=settings.slow_client_timeout)
        self._metrics = WorkerMetrics(self._registry)
        self._metrics.slow_clients.set_function(lambda: self._egress.slow_streams)
        self._engine: Engine | None = None
        #: What is registered, once it is.
        self._ready: EngineInfo | None = None
        self._runtime: Runtime | None = None
        self._status: StatusServer | None = None
        self._frontend: FrontendProcess | None = None
        self._frontend_watch: ProcessWatch | None = None
        self._frontend_monitor: asyncio.Task[None] | None = None
        self._registration: Registration | None = None
        self._processes: ProcessWatch | None = None
        self._withdrawn = False
        self._stop_level = 0
        self._stop_signal = signal.SIGTERM
        self._stopped_at = 0.0
        self._signal_at = 0.0
        self._deadline: Deadline | None = None
        self._error: BaseException | None = None
        self._found_dead: BaseException | None = None
        self._exit_code: int = ExitCode.STOPPED
        run_dir = os.environ.get(RUN_DIR)
        self._run_dir = Path(run_dir) if run_dir and control.supervised else None
        #: The run directory, if it is ours to remove.
        self._made_dir: RunDirectory | None = None
        #: One line about why the worker ended.
        self.reason = "stopped"

    async def run(self) -> int:
        """Live, and return the exit code."""
        loop = asyncio.get_running_loop()
        self._control.listen(loop, self._on_message)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                loop.add_signal_handler(number, self._on_signal, number)
        self._processes = ProcessWatch(loop, self._on_fatal)
        self._frontend_watch = ProcessWatch(loop, self._on_fatal)
        log.info("Starting worker", engine=self._settings.engine, version=__version__, pid=os.getpid())
        self._announce()
        self._stage = asyncio.ensure_future(self._run_stage(State.STARTING, self._start))
        while self._state is not State.STOPPED:
            event = await self._events.get()
            await self._move(TRANSITIONS[self._state, event])
        return self._exit_code

    # ---------------------------------------------------------------------------------------------- transitions

    async def _move(self, state: State) -> None:
        if state is self._state:
            return
        now = time.monotonic()
        self._metrics.shutdown_stage_seconds.labels(self._state.value).set(now - self._entered)
        previous, self._state, self._entered = self._state, state, now
        self._metrics.set_state(state)
        if self._stage is not None and not self._stage.done():
            self._stage.cancel()
            await asyncio.wait({self._stage}, timeout=_CANCEL_START)
        stage: Stage | None = None
        if state is State.SERVING:
            self._serving()
        elif state is State.UNREGISTERING:
            log.info("Leaving discovery", in_flight=len(self._registry))
            stage = self._unregistering
        elif state is State.GRACE:
            log.info("Grace period", seconds=self._plan.grace, in_flight=len(self._registry))
            stage = self._grace
        elif state is State.DRAINING:
            stage = self._draining
        elif state is State.CLEANUP:
            if previous is State.STARTING:
                self.reason = "stopped during the start"
                # Nothing is in flight: the time for requests is not needed.
                self._deadline = ShutdownPlan.forced_deadline(self._stopped_at)
            if self._stop_level > 1:
                self._force()
            log.info("Cleaning up worker", in_flight=len(self._registry))
            stage = self._cleanup
        elif state is State.FATAL:
            self._condemn()
            stage = self._fatal
        else:
            log.info("Worker process ends", exit_code=int(self._exit_code), reason=self.reason)
        self._announce()
        if stage is not None:
            self._stage = asyncio.ensure_future(self._run_stage(state, stage))

    async def _run_stage(self, state: State, stage: Stage) -> None:
        """Run a state's coroutine and post the event that says it has ended."""
        done = {
            State.STARTING: Event.ENGINE_READY,
            State.UNREGISTERING: Event.UNREGISTERED,
            State.GRACE: Event.GRACE_OVER,
            State.DRAINING: Event.DRAINED,
            State.CLEANUP: Event.CLEANED_UP,
            State.FATAL: Event.CLEANED_UP,
        }[state]
        try:
            await stage()
        except BaseException as error:
            if self._state is not state:  # cancelled: the worker has moved on
                return
            # An engine's start may also end the interpreter, be cancelled from within, or panic in Rust code.
            if state is State.STARTING:
                # An error that was reported before is the cause, this one its consequence.
                self._error = self._error or self._explained(error)
                self._events.put_nowait(Event.START_FAILED)
                return
            # A bug of ours must not keep a shutdown from going on.
            log.error("Shutdown stage failed", state=state, exc_info=error)
        self._events.put_nowait(done)

    @staticmethod
    def _explained(error: BaseException) -> BaseException:
        """Return an error that says what to do where this one says only that something has run short."""
        explained = shortage(error)
        if explained is None:
            return error
        explained.__cause__ = error
        return explained

    def _announce(self) -> None:
        self._control.send(
            "state",
            state=self._state.value,
            deadline=self._deadline.at if self._deadline else None,
            in_flight=len(self._registry),
            reason=self.reason if self._state in (State.FATAL, State.STOPPED) else None,
        )

    # ------------------------------------------------------------------------------------------------- requests

    def _on_message(self, message: dict[str, Any]) -> None:
        if message.get("type") == "stop":
            self._stop(int(message["level"]), signal.Signals[message["signal"]], float(message["at"]))

    def _on_signal(self, number: signal.Signals) -> None:
        """Take a signal that was sent to the worker itself, not to its supervisor."""
        now = time.monotonic()
        forced = number == signal.SIGQUIT
        if now < self._signal_at + SIGNAL_DEBOUNCE and not (forced and self._stop_level < 2):
            return
        self._signal_at = now
        if forced:
            faulthandler.dump_traceback(all_threads=True)
        level = max(self._stop_level + 1, 2 if forced else 1)
        effect = {1: f"stop gracefully, again to stop within {FORCED_STOP:g} s", 2: "stop now, again to kill"}
        log.info("Received shutdown signal", signal=signal.Signals(number).name, effect=effect.get(level, "kill"))
        self._stop(level, signal.Signals(number), now)

    def _stop(self, level: int, number: signal.Signals, received_at: float) -> None:
        if level <= self._stop_level:
            return
        self._stop_level, self._stop_signal = level, number
        if level == 1:
            self._stopped_at = received_at
            if self._state is not State.FATAL:
                self.reason = f"stopped by {number.name}"
                self._deadline = self._plan.worker_deadline(received_at)
            self._events.put_nowait(Event.STOP_REQUESTED)
        elif level == 2:
            self._stopped_at = received_at
            if not self._control.supervised:
                asyncio.get_running_loop().call_later(FORCED_STOP, os._exit, SIGNAL_BASE + number)
            if self._state is State.CLEANUP:
                self._force()
            self._events.put_nowait(Event.FORCE_STOP_REQUESTED)
        else:
            os._exit(SIGNAL_BASE + number)

    def _force(self) -> None:
        self.reason = f"forced to stop by a second {self._stop_signal.name}"
        self._exit_code = SIGNAL_BASE + self._stop_signal
        self._deadline = ShutdownPlan.forced_deadline(self._stopped_at)

    def _on_fatal(self, error: BaseException) -> None:
        """Take note of a fatal error; the first one is the cause, what follows are its consequences."""
        if self._error is not None or self._state in (State.CLEANUP, State.FATAL, State.STOPPED):
            log.debug("Later error", error=describe(error))
            return
        self._error = error
        self._events.put_nowait(Event.FATAL_ERROR)

    def on_escaped(self, error: BaseException) -> None:
        """Take note of what has left a task of the engine and stopped the event loop: the engine wants to end."""
        self._on_fatal(error)

    def _on_request_found_dead(self, error: BaseException) -> None:
        """Take note of an engine that a request found dead.

        A dying process closes its connections a moment before its pidfd tells of the death, and only the pidfd knows
        the cause: let it come first.
        """
        self._found_dead = self._found_dead or error
        asyncio.get_running_loop().call_later(_CAUSE_SECONDS, self._on_fatal, error)

    # --------------------------------------------------------------------------------------------------- stages

    async def _start(self) -> None:
        settings = self._settings
        if settings.system_port >= 0:
            self._status = StatusServer(
                lambda: self._state,
                live_path=os.environ.get("DYN_SYSTEM_LIVE_PATH", "/live"),
                health_path=os.environ.get("DYN_SYSTEM_HEALTH_PATH", "/health"),
                problem=lambda: self._runtime.problem if self._runtime is not None else None,
                access=ControlAccess(read_token(settings.control_token_file)),
            )
            port = await self._status.start(settings.system_host, settings.system_port)
            log.info("Status server listening", url=f"http://{Address(settings.system_host, port)}")
        private_dir = self._run_dir = self._run_dir or self._make_run_dir()
        if settings.frontend is not None:
            settings = self._start_frontend(private_dir)
        runtime = self._runtime = await Runtime.create(settings)
        if self._status is not None and runtime.status_port is not None:
            self._status.forward_to(runtime.status_host, runtime.status_port)
        context = EngineContext(
            component=f"{settings.namespace}.{settings.component}",
            private_dir=private_dir,
            supervised=self._control.supervised,
            allowed_paths=AllowedPaths(settings.control_load_root, settings.control_write_root),
            events_wanted=settings.events_wanted,
            discovery=runtime.discovery,
        )
        engine = self._plugins.create_engine(self._engine_args, context)
        checks = EngineChecks(self._plugins.engine)
        checks.methods(engine)
        self._engine = engine
        info = await checks.started(engine.start(runtime.worker_id))
        assert self._processes is not None
        self._processes.watch(checks.pids(engine.processes()), "engine process")
        if info.model_path is not None:
            await self._warm_up(engine, checks, info.vocab_size)
        if not can_start_thread():
            raise StartError(NO_THREADS, hint=NO_THREADS_HINT)
        # What was made until now lives as long as the worker: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        main = EndpointSpec(
            settings.endpoint, metrics_labels=(("model", info.model_name),), registers_model=info.model_path is not None
        )
        endpoints = [main, *info.endpoints] if info.model_path is not None else list(info.endpoints)
        self._egress.start()
        handler = RequestHandler(
            engine,
            self._registry,
            self._egress,
            self._on_request_found_dead,
            info.vocab_size,
            info.context_length,
        )
        before = listening_ports()
        if isinstance(engine, PublishesEvents):
            await engine.attach(runtime.endpoint(main.name), runtime.completed(info))
        runtime.record_registration(self._run_dir)
        for spec in endpoints:
            runtime.serve(spec, handler.handler(spec)).add_done_callback(self._on_endpoint_closed)
        for spec in endpoints:
            if spec.registers_model:
                await runtime.register(info, endpoint=spec.name)
        self._registration = await runtime.watch_registration(self._on_fatal)
        if isinstance(engine, HasMetrics):
            self._metrics.add_registry(engine.metrics_registry())
        if self._status is not None:
            routes = engine.control_routes() if isinstance(engine, HasControlRoutes) else {}
            self._status.serve_routes(checks.mapping("control_routes", routes))
        runtime.expose_metrics(self._metrics.exposition, endpoint=main.name)
        if self._frontend is not None:
            await self._frontend.wait_ready(_offered(runtime.completed(info)))
            assert self._frontend_watch is not None
            self._frontend_watch.watch([self._frontend.pid], "frontend process", WorkerError)
        # Not sooner: the runtime opens the port of a publisher some time after the publisher is made.
        runtime.close_to_others(before)
        runtime.set_ready(True)
        self._ready = runtime.completed(info)
        seconds = time.monotonic() - self._created
        self._metrics.start_seconds.set(seconds)
        log.info(
            "Worker ready",
            model=info.model_name,
            endpoint=f"{context.component}.{main.name}",
            instance=f"{runtime.worker_id:x}",
            start_s=seconds,
        )
        if self._frontend is not None:
            # In the message, not a field: a field would be quoted, and this is there to be copied.
            body = f'{{"model": "{info.model_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
            header = "-H 'content-type: application/json'"
            hint = f"Try it: curl {self._frontend.url}/v1/chat/completions {header} -d '{body}'"
            log.info(hint)

    def _start_frontend(self, private_dir: Path) -> WorkerSettings:
        """Start the frontend beside the worker; with file discovery both meet in the private directory."""
        settings = self._settings
        if settings.on_loopback and stay_on_loopback() and settings.discovery_backend != "file":
            log.warning(
                "Only frontends of this machine can reach this worker, and all will find it",
                discovery=settings.discovery_backend,
                next="set DYN_TCP_RPC_HOST, or name an address of the network with --frontend",
            )
        if settings.discovery_backend == "file" and settings.discovery_path is None:
            settings = settings.model_copy(update={"discovery_path": private_dir / "discovery"})
        if settings.discovery_path is not None:
            directory = writable_directory(settings.discovery_path)
            settings = settings.model_copy(update={"discovery_path": directory})
        self._frontend = FrontendProcess.start(settings, settings.discovery_path, private_dir)
        return settings

    async def _warm_up(self, engine: Engine, checks: EngineChecks, vocab_size: int | None) -> None:
        """Make the first request ourselves: it compiles kernels on some engines, for as long as 20 s (measured).

        :raises StartError: it takes too long, or its answer is not what clients could be given.
        """
        if not self._settings.warmup:
            return
        if not isinstance(engine, HasCanary):
            log.warning("No warm-up and no stall detection: the engine has no canary request")
            return
        started = time.monotonic()
        request = checks.canary(engine.canary_request(), vocab_size)
        answer = AnswerCheck(checks, vocab_size)

        def generate(request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
            return checks.stream(engine.generate(request, context))

        try:
            asking = contained(lambda: self._ask(generate, request, answer.take))
            await asyncio.wait_for(asking, self._settings.warmup_timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise StartError(
                f"the engine did not answer its first request within {self._settings.warmup_timeout:g} s",
                hint="raise --warmup-timeout, or look for the reason in the engine's own messages",
            ) from None
        answer.end()
        log.info("Engine warmed up", seconds=time.monotonic() - started)

    async def _canary(self) -> None:
        """Make the engine produce one chunk."""
        engine = self._engine
        assert engine is not None
        assert isinstance(engine, HasCanary)
        await self._ask(engine.generate, engine.canary_request(), lambda _: None)

    async def _ask(self, generate: Generate, request: Request, take: Callable[[Chunk], None]) -> None:
        """Make a request of our own, and ``take`` the chunks of its answer."""
        engine = self._engine
        assert engine is not None
        request_id = f"canary-{time.monotonic_ns():x}"
        try:
            async for chunk in generate(request, LocalContext(request_id)):
                take(chunk)
                self._registry.chunks += 1
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # whether it can be aborted or not: it has not been answered
                await asyncio.wait_for(contained(lambda: engine.abort(request_id)), _CUT_SECONDS)
            raise

    def _serving(self) -> None:
        settings, engine, runtime = self._settings, self._engine, self._runtime
        assert engine is not None
        assert runtime is not None
        watches = [
            Heartbeat(self._control, self._registry, self._metrics, timeout=settings.heartbeat_timeout).run(),
            HealthMonitor(
                self._plugins,
                engine,
                self._metrics,
                self._on_fatal,
                interval=settings.health_check_interval,
                timeout=settings.health_check_timeout,
            ).run(),
            ThreadMonitor(self._on_no_threads, interval=settings.health_check_interval).run(),
        ]
        if settings.stall_timeout and isinstance(engine, HasCanary):
            watches.append(
                StallMonitor(engine, self._registry, self._canary, self._on_fatal, timeout=settings.stall_timeout).run()
            )
        if self._registration is not None:
            watches.append(self._registration.run())
        assert self._ready is not None
        watches.append(self._on_ready(engine, self._ready))
        self._monitors = [asyncio.ensure_future(self._watch(watch)) for watch in watches]
        if self._frontend is not None:
            monitor = FrontendMonitor(
                self._frontend.check,
                self._on_frontend_hung,
                interval=settings.health_check_interval,
                timeout=settings.health_check_timeout,
            )
            self._frontend_monitor = asyncio.ensure_future(self._watch(monitor.run()))
            self._monitors.append(self._frontend_monitor)

    async def _on_ready(self, engine: Engine, info: EngineInfo) -> None:
        await self._plugins.on_ready(engine, info, self._settings.health_check_timeout)

    async def _watch(self, monitor: Coroutine[Any, Any, None]) -> None:
        """Make sure that a monitor which fails (an engine's ``progress`` may raise) does not do so unseen."""
        try:
            await monitor
        except BaseException as error:
            if asyncio.current_task() in self._monitors:  # not one that we have cancelled
                log.error("Monitor failed; the worker goes on without it", exc_info=error)

    def _on_no_threads(self, error: WorkerError) -> None:
        """Give requests away that would wait for a thread; a worker that stops lets those it has finish instead."""
        if self._state is State.SERVING:
            self._on_fatal(error)
        else:
            log.warning("No thread can be started any more; the stop goes on", hint=error.hint)

    def _on_frontend_hung(self, error: WorkerError) -> None:
        assert self._frontend is not None
        self._on_fatal(error)
        self._frontend.kill()  # it would not end when it is asked to

    def _drain_frontend(self) -> None:
        """Have the frontend take no new connections; it ends with its last stream, which may be after us."""
        if self._frontend is not None:
            assert self._frontend_watch is not None
            self._frontend_watch.close()
            monitor = self._frontend_monitor
            if monitor is not None and monitor in self._monitors:
                self._monitors.remove(monitor)
                monitor.cancel()
            self._frontend.drain()

    async def _unregistering(self) -> None:
        await self._unregister(self._plan.unregister_deadline(self._stopped_at))

    async def _unregister(self, deadline: Deadline) -> None:
        """Leave discovery by the deadline; what cannot be taken back, the supervisor withdraws at the end."""
        runtime = self._runtime
        if runtime is None or self._withdrawn:
            return
        runtime.set_ready(False)
        try:
            self._withdrawn = await asyncio.wait_for(contained(runtime.unregister), deadline.remaining())
        except (asyncio.TimeoutError, TimeoutError):
            log.warning("Discovery did not answer; the supervisor withdraws the registration at the end")

    async def _grace(self) -> None:
        deadline = self._plan.grace_deadline(time.monotonic(), self._stopped_at)
        await asyncio.sleep(deadline.remaining())

    async def _draining(self) -> None:
        """Refuse new requests, let those in flight finish, hand off what is left when the budget ends."""
        registry, engine = self._registry, self._engine
        assert engine is not None
        deadline = self._plan.drain_deadline(self._stopped_at)
        failed = registry.outcomes[RequestOutcome.FAILED]
        log.info("Draining", mode=self._settings.drain, in_flight=len(registry), budget_s=deadline.remaining())
        self._drain_frontend()
        registry.refuse("the worker is shutting down")
        registry.cut(Cut.HANDOFF, graceful=False)
        if self._settings.drain == "handoff":
            registry.cut(Cut.HANDOFF)
        elif self._settings.drain == "abort":
            registry.cut(Cut.ABORT)
        hooks = asyncio.ensure_future(self._plugins.drain(engine, deadline.reserve(_HOOK_MARGIN)))
        finished = asyncio.ensure_future(registry.wait_idle())
        with DrainProgress(registry, deadline):
            await asyncio.wait({hooks, finished}, timeout=deadline.remaining())
        for task in (hooks, finished):
            task.cancel()
        if self._found_dead is not None:
            await asyncio.sleep(_CAUSE_SECONDS)
            self._on_fatal(self._found_dead)
        elif registry.outcomes[RequestOutcome.FAILED] > failed:
            # They may have failed because the engine is dying, which is about to be known.
            known_by = Deadline.after(_DEATH_SECONDS)
            while self._error is None and not known_by.passed:
                await asyncio.sleep(_CAUSE_SECONDS)

    async def _cut_the_rest(self, how: Cut, reason: str) -> None:
        """Refuse new requests and end those in flight; a moment for their last message to leave."""
        registry = self._registry
        registry.refuse(reason)
        cut = registry.cut(how)
        if cut:
            log.info("Handing off requests" if how is Cut.HANDOFF else "Aborting requests", requests=cut)
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(registry.wait_idle(), _CUT_SECONDS)

    async def _cleanup(self) -> None:
        self._stop_monitors()
        deadline = self._deadline or Deadline.after(self._settings.engine_shutdown_timeout)
        # Here only after a forced stop, or one during the start.
        await self._attempt("leave discovery", self._unregister(deadline.within(_FATAL_UNREGISTER)))
        how = Cut.ABORT if self._settings.drain == "abort" else Cut.HANDOFF
        await self._cut_the_rest(how, "the worker is shutting down")
        await self._release(deadline)

    def _condemn(self) -> None:
        """Decide, from the fatal error, on the exit code and the reason."""
        error = self._error
        assert error is not None
        starting = self._runtime is None or self._engine is None or not self._monitors
        if isinstance(error, WorkerError) and (error.exit_code is not ExitCode.FATAL or not starting):
            self._exit_code = error.exit_code
        else:
            self._exit_code = ExitCode.START_FAILED if starting else ExitCode.FATAL
        self.reason = str(error.args[0]) if isinstance(error, WorkerError) else describe(error)
        self._metrics.fatal_errors.labels(type(error).__name__).inc()
        budget = _FATAL_UNREGISTER + _CUT_SECONDS + _LAST_WORDS + _FATAL_CLEANUP + _RUNTIME_SHUTDOWN
        self._deadline = self._deadline.within(budget) if self._deadline else Deadline.after(budget)

    async def _fatal(self) -> None:
        error, deadline = self._error, self._deadline
        assert error is not None
        assert deadline is not None
        self._stop_monitors()
        await self._attempt("leave discovery", self._unregister(deadline.within(_FATAL_UNREGISTER)))
        # Logged only now: every millisecond in discovery brings requests that cannot be served.
        hint = {"next": error.hint} if isinstance(error, WorkerError) and error.hint else {}
        log.error(
            "Fatal error",
            kind=type(error).__name__,
            error=self.reason,
            exit_code=int(self._exit_code),
            in_flight=len(self._registry),
            **hint,
            exc_info=None if isinstance(error, WorkerError) else error,
        )
        await self._cut_the_rest(Cut.HANDOFF, self.reason)
        await self._plugins.on_fatal_error(self._engine, error, deadline.within(_LAST_WORDS))
        await self._release(deadline.within(_FATAL_CLEANUP + _RUNTIME_SHUTDOWN))

    async def _release(self, deadline: Deadline) -> None:
        """Release everything, each by itself: connections, engine, frontend, files."""
        if self._processes is not None:
            self._processes.close()
        if self._status is not None:
            self._status.stop_routes()
        if self._runtime is not None:
            shutdown = self._runtime.shutdown(deadline.within(_RUNTIME_SHUTDOWN).remaining())
            if await self._attempt("shut the runtime down", shutdown):
                log.info("DistributedRuntime shutdown complete")
        if self._engine is not None:
            hooks = self._plugins.cleanup(
                self._engine, deadline.reserve(_HOOK_MARGIN), limit=self._settings.engine_shutdown_timeout
            )
            await self._attempt("clean up", hooks)
        self._drain_frontend()
        failure = self._frontend.failure if self._frontend is not None else None
        if failure is not None and self._exit_code == ExitCode.STOPPED:
            log.warning("The frontend ended before its streams did", how=failure)
            self._exit_code, self.reason = ExitCode.FATAL, f"the frontend ended before its streams did: {failure}"
        if self._frontend is not None and not self._control.supervised:  # else who cleans up behind us waits for it
            abort = self._settings.drain == "abort"
            stop = self._frontend.stop(deadline.within(FRONTEND_ABORT_SECONDS) if abort else deadline)
            await self._attempt("stop the frontend", stop)
        if self._status is not None:
            self._status.close()
        if self._made_dir is not None:
            problems = self._made_dir.remove(time.monotonic() + deadline.remaining())
            self._made_dir.close()
            if problems:
                log.warning("Run directory not removed", path=self._made_dir.path, reason="; ".join(problems[:3]))

    def _make_run_dir(self) -> Path:
        """Make the directory that a supervisor would have made, and return its path.

        :raises StartError: there is no safe place for it.
        """
        try:
            made = self._made_dir = RunDirectory.create()
        except OSError as error:
            raise StartError(f"cannot create the worker's private directory: {error.strerror}") from error
        if made.trouble:
            log.warning("TMPDIR cannot be used as it is", used=made.base, reason="; ".join(made.trouble))
        return Path(made.path)

    async def _attempt(self, what: str, step: Awaitable[Any]) -> bool:
        """Take one step of the end; one that fails is logged and does not keep the next ones from being taken."""
        state = self._state
        try:
            await step
        except BaseException as error:
            if self._state is not state:  # cancelled: the worker has moved on
                raise
            log.error("Shutdown step failed", step=what, state=state, exc_info=error)
            return False
        return True

    def _stop_monitors(self) -> None:
        monitors, self._monitors = self._monitors, []
        for monitor in monitors:
            monitor.cancel()

    def _on_endpoint_closed(self, task: asyncio.Task[None]) -> None:
        """Take the end of an endpoint for what it is: asked for, or the loss of discovery."""
        if task.cancelled() or self._state not in (State.STARTING, State.SERVING, State.GRACE, State.UNREGISTERING):
            return
        error = task.exception()
        if error is not None:
            self._on_fatal(StartError(f"the endpoint cannot be served: {error}"))
        else:
            self._on_fatal(
                DiscoveryLostError(
                    "the Dynamo runtime has shut down by itself: the connection to "
                    f"{self._settings.discovery_backend} discovery, or the lease there, is lost"
                )
            )


def _offered(info: EngineInfo) -> str | None:
    """Return the model that a frontend lists, or None if it needs more than this worker to list it."""
    complete = info.worker_type == "aggregated" and not info.needs
    clients = not {"chat", "completions"}.isdisjoint(info.endpoint_types)
    return info.model_name if info.model_path is not None and complete and clients else None
