"""The worker process: executes the state table of ``lifecycle.py`` and ends with an exit code.

Every state has at most one coroutine, and every coroutine ends with one event: see ``Launcher._stages``.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import uvloop

from dynamo_worker import __version__, logs
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import DiscoveryLostError, WorkerError, describe
from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.host import native_output
from dynamo_worker.host.config.drain_mode import Cut
from dynamo_worker.host.config.shutdown_plan import ShutdownPlan
from dynamo_worker.host.crash_report import explained, print_crash
from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.host.draining import CUT_SECONDS
from dynamo_worker.host.flight_reports import death_observer, hook_observer, send_plan, send_settings
from dynamo_worker.host.monitoring import start_monitors
from dynamo_worker.host.monitors.monitor_tasks import MonitorTasks
from dynamo_worker.host.monitors.process_watch import ProcessWatch
from dynamo_worker.host.parts import WorkerParts
from dynamo_worker.host.requests.egress import Egress
from dynamo_worker.host.requests.serving import RequestOutcome, RequestRegistry
from dynamo_worker.host.shutdown import RUNTIME_SECONDS, Shutdown
from dynamo_worker.host.startup import Callbacks, Startup
from dynamo_worker.host.status.metrics import WorkerMetrics
from dynamo_worker.host.stop_requests import StopRequests
from dynamo_worker.host.supervisor_channel import SupervisorChannel
from dynamo_worker.lifecycle import TRANSITIONS, Event, State
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.parts import ReadyWorker
    from dynamo_worker.host.plugins.facade import Plugins

log = get_logger(__name__)

#: Seconds to leave discovery after a fatal error; discovery itself may have failed.
_FATAL_UNREGISTER: Final = 0.5
#: Seconds for the ``on_fatal_error`` hooks.
_FATAL_HOOKS: Final = 2.0
#: Seconds for the clean-up after a fatal error; the supervisor removes the rest.
_FATAL_CLEANUP: Final = 5.0
_FATAL_TOTAL: Final = _FATAL_UNREGISTER + CUT_SECONDS + _FATAL_HOOKS + _FATAL_CLEANUP + RUNTIME_SECONDS
#: Seconds that an error found by a request waits for its cause to be reported.
_CAUSE_SECONDS: Final = 0.01
#: Seconds within which a process that has closed its connections is dead, on an overloaded machine.
_DEATH_SECONDS: Final = 0.1
#: Seconds for the reader of our output to take the rest of it at the end.
_LAST_OUTPUT: Final = 0.5
#: Seconds for a cancelled stage to end.
_CANCEL_SECONDS: Final = 1.0


def run(settings: WorkerSettings, plugins: Plugins, engine_args: Any) -> int:
    """Run one worker from start to end; does not return but ends the process with the worker's exit code.

    It always ends with ``os._exit``: engines leave threads and ``atexit`` handlers that can hang for minutes, and the
    runtime's threads delay an orderly exit by a quarter of a second (measured). By then the shutdown has released
    everything that needs it, in order and under a deadline.
    """
    faulthandler.enable(all_threads=True)
    # The supervisor asks for the stacks of a worker that hangs; this works while native code holds the GIL.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    stderr = logs.UnblockedStream(sys.stderr)
    logs.setup(settings.log_level, settings.log_format, stderr)
    native_output.redirect(stderr)
    control = SupervisorChannel.from_environment()
    send_settings(control, settings)
    control.offer_stack()
    plugins.observer = hook_observer(control)
    launcher = Launcher(settings, plugins, engine_args, control)
    uvloop.install()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    exit_code = _run_until_stopped(loop, launcher)
    control.send("exit", code=exit_code, reason=launcher.reason, **launcher.numbers)
    _flush(stderr)
    os._exit(exit_code)


def _run_until_stopped(loop: asyncio.AbstractEventLoop, launcher: Launcher) -> int:
    """Run the launcher on the loop and return its exit code, whatever else ends the loop meanwhile."""
    life = loop.create_task(launcher.run())
    while True:
        try:
            return loop.run_until_complete(life)
        except BaseException as error:  # noqa: PERF203 - as rare as it gets
            if life.done():
                print_crash(error)
                launcher.reason = f"bug in dynamo-worker: {describe(error)}"
                return ExitCode.FATAL
            # SystemExit and KeyboardInterrupt stop the loop when they leave a task or a callback. It must be one of
            # the engine's, because none of ours lets them out. The loop can continue where it was.
            launcher.on_escaped(error)


def _flush(stderr: logs.UnblockedStream) -> None:
    """Flush all buffered output; a reader that is stuck or gone delays the exit, but not for long."""
    flushed = threading.Event()

    def flush_stdout() -> None:
        with contextlib.suppress(Exception):  # whatever the engine put in its place
            sys.stdout.flush()
        flushed.set()

    with contextlib.suppress(RuntimeError, MemoryError):  # no thread can be started
        # Not `threading.Thread`: its `start` waits forever for a thread that dies at birth for lack of memory.
        _thread.start_new_thread(flush_stdout, ())
        flushed.wait(_LAST_OUTPUT)
    stderr.drain(_LAST_OUTPUT)


@dataclass(frozen=True)
class _Stage:
    """The work of one state.

    :param enter: called on entry, with the previous state.
    :param work: the state's coroutine function; None if the worker only waits for events there.
    :param ends_with: the event to post after the work; None without work.
    """

    enter: Callable[[State], None]
    work: Callable[[], Coroutine[Any, Any, None]] | None = None
    ends_with: Event | None = None


class Launcher:
    """The state machine of one worker.

    :ivar reason: why the worker ended, in one line.
    """

    def __init__(
        self, settings: WorkerSettings, plugins: Plugins, engine_args: Any, control: SupervisorChannel
    ) -> None:
        self.reason = "stopped"
        self._settings = settings
        self._plugins = plugins
        self._control = control
        self._plan = settings.shutdown_plan
        self._state = State.STARTING
        self._entered = time.monotonic()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._stage: asyncio.Task[None] | None = None
        self._stop = StopRequests(control, self._on_stop)
        self._deadline: Deadline | None = None
        self._drain_phase = DrainPhase.SERVING
        self._exit_code: int = ExitCode.STOPPED
        #: The first fatal error, which is the cause of the others.
        self._error: BaseException | None = None
        #: The first error of a request that found the engine dead.
        self._found_dead: BaseException | None = None
        self._requests = RequestRegistry()
        self._metrics = WorkerMetrics(self._requests)
        egress = Egress(self._on_fatal, slow_client_timeout=settings.slow_client_timeout)
        self._metrics.slow_clients.set_function(lambda: egress.slow_streams)
        processes = ProcessWatch(self._on_fatal, death_observer(control))
        self._parts = WorkerParts(self._requests, egress, self._metrics, processes, MonitorTasks())
        callbacks = Callbacks(
            lambda: self._state,
            self._on_fatal,
            self._on_found_dead,
            self._on_endpoint_closed,
            self._on_drain_phase,
        )
        self._startup = Startup(settings, plugins, engine_args, self._parts, callbacks, control)
        self._shutdown = Shutdown(settings, plugins, self._parts, callbacks.state, supervised=control.supervised)
        self._ready: ReadyWorker | None = None
        self._stages = {
            State.STARTING: _Stage(self._enter_starting, self._start, Event.ENGINE_READY),
            State.SERVING: _Stage(self._enter_serving),
            State.UNREGISTERING: _Stage(self._enter_unregistering, self._unregister, Event.UNREGISTERED),
            State.GRACE: _Stage(self._enter_grace, self._wait_for_routers, Event.GRACE_OVER),
            State.DRAINING: _Stage(self._enter_draining, self._drain, Event.DRAINED),
            State.CLEANUP: _Stage(self._enter_cleanup, self._clean_up, Event.CLEANED_UP),
            State.FATAL: _Stage(self._record_fatal, self._end_after_fatal, Event.CLEANED_UP),
            State.STOPPED: _Stage(self._enter_stopped),
        }

    async def run(self) -> int:
        """Go through the states until the last one, and return the exit code."""
        self._stop.listen()
        self._enter(State.STARTING, State.STARTING)
        while self._state is not State.STOPPED:
            event = await self._events.get()
            state = TRANSITIONS[self._state, event]
            if state is not self._state:
                await self._move(state)
        return self._exit_code

    # ---------------------------------------------------------------------------------------------- transitions

    async def _move(self, state: State) -> None:
        now = time.monotonic()
        self._metrics.shutdown_stage_seconds.labels(self._state.value).set(now - self._entered)
        previous, self._state, self._entered = self._state, state, now
        if self._stage is not None and not self._stage.done():
            self._stage.cancel()
            await asyncio.wait({self._stage}, timeout=_CANCEL_SECONDS)
        self._enter(state, previous)

    def _enter(self, state: State, previous: State) -> None:
        stage = self._stages[state]
        stage.enter(previous)
        self._announce()
        if stage.work is not None and stage.ends_with is not None:
            self._stage = asyncio.ensure_future(self._work(state, stage.work, stage.ends_with))

    async def _work(self, state: State, work: Callable[[], Coroutine[Any, Any, None]], ends_with: Event) -> None:
        """Run a state's coroutine, then post the event that it ends with."""
        try:
            await work()
        except BaseException as error:
            if self._state is not state:  # cancelled: the worker has moved on
                return
            # An engine's start may also raise SystemExit, be cancelled from within, or panic in Rust code.
            if state is State.STARTING:
                # An error that was reported earlier is the cause, this one its consequence.
                self._error = self._error or explained(error)
                self._events.put_nowait(Event.START_FAILED)
                return
            # A bug in one stage must not keep the next ones from running.
            log.error("Shutdown stage failed", state=state, exc_info=error)
        self._events.put_nowait(ends_with)

    def _announce(self) -> None:
        self._metrics.set_state(self._state, self._deadline)
        self._control.send(
            "state",
            state=self._state.value,
            deadline=self._deadline.at if self._deadline else None,
            reason=self.reason if self._state in (State.FATAL, State.STOPPED) else None,
            drain=self._drain_phase.value,
            **self.numbers,
        )

    @property
    def numbers(self) -> dict[str, Any]:
        """What the supervisor records with each state: requests, and the fatal error's kind."""
        kind = self._error and type(self._error).__name__
        return {"in_flight": len(self._requests), "counts": self._requests.counts, "error": kind}

    # --------------------------------------------------------------------------------------------------- events

    def _on_stop(self, level: int) -> None:
        if level == 1:
            if self._state is not State.FATAL:
                self.reason = f"stopped by {self._stop.signal.name}"
                self._deadline = self._plan.worker_deadline(self._stop.at)
            self._events.put_nowait(Event.STOP_REQUESTED)
        else:
            if self._state is State.CLEANUP:
                self._force()
            self._events.put_nowait(Event.FORCE_STOP_REQUESTED)

    def _force(self) -> None:
        self.reason = f"forced to stop by a second {self._stop.signal.name}"
        self._exit_code = SIGNAL_BASE + self._stop.signal
        self._deadline = ShutdownPlan.forced_deadline(self._stop.at)

    def _on_fatal(self, error: BaseException) -> None:
        """Record a fatal error; the first one is the cause, later ones are its consequences."""
        if self._error is not None or self._state in (State.CLEANUP, State.FATAL, State.STOPPED):
            log.debug("Later error", error=describe(error))
            return
        self._error = error
        self._events.put_nowait(Event.FATAL_ERROR)

    def on_escaped(self, error: BaseException) -> None:
        """Record an exception that left a task of the engine and stopped the event loop."""
        self._on_fatal(error)

    def _on_found_dead(self, error: BaseException) -> None:
        """Record that a request found the engine dead.

        A dying process closes its connections a moment before its pidfd reports the death, and only the pidfd knows
        the cause: let it report first.
        """
        self._found_dead = self._found_dead or error
        asyncio.get_running_loop().call_later(_CAUSE_SECONDS, self._on_fatal, error)

    def _on_no_threads(self, error: WorkerError) -> None:
        """Hand off requests that would wait for a thread; a worker that stops lets those it has finish instead."""
        if self._state is State.SERVING:
            self._on_fatal(error)
        else:
            log.warning("No more threads can be started; the shutdown continues", next=error.hint)

    def _on_drain_phase(self, phase: DrainPhase) -> None:
        self._drain_phase = phase
        self._metrics.set_drain_phase(phase)
        self._announce()

    def _on_endpoint_closed(self, name: str, task: asyncio.Task[None]) -> None:
        """Record that an endpoint has ended before the worker closed it: it failed, or discovery is lost."""
        if task.cancelled() or self._state not in (State.STARTING, State.SERVING, State.GRACE, State.UNREGISTERING):
            return
        error = task.exception()
        if error is not None:
            self._on_fatal(WorkerError(f"the endpoint {name!r} failed: {error}"))
        else:
            self._on_fatal(
                DiscoveryLostError(
                    "the Dynamo runtime shut down unexpectedly: it lost its connection to "
                    f"{self._settings.discovery_backend} discovery, or its lease there"
                )
            )

    # --------------------------------------------------------------------------------------------------- stages

    @property
    def _worker(self) -> ReadyWorker:
        """The started worker; only for states that the state table allows after the start."""
        assert self._ready is not None
        return self._ready

    def _enter_starting(self, _: State) -> None:
        log.info("Starting worker", **self._plugins.engine.identity, worker_version=__version__, pid=os.getpid())

    async def _start(self) -> None:
        self._ready = await self._startup.run()
        self._settings = self._ready.settings
        self._plan = self._settings.shutdown_plan
        self._shutdown.use(self._settings)
        send_plan(self._control, self._settings)

    def _enter_serving(self, _: State) -> None:
        start_monitors(
            self._parts,
            self._worker,
            self._settings,
            self._plugins,
            self._control,
            on_fatal=self._on_fatal,
            on_no_threads=self._on_no_threads,
        )

    def _enter_unregistering(self, _: State) -> None:
        log.info("Leaving discovery", in_flight=len(self._requests))

    async def _unregister(self) -> None:
        await self._shutdown.unregister(self._plan.unregister_deadline(self._stop.at))

    def _enter_grace(self, _: State) -> None:
        seconds = self._shutdown.grace_deadline(self._stop.at).remaining()
        log.info("Grace period", seconds=seconds, in_flight=len(self._requests))

    async def _wait_for_routers(self) -> None:
        await asyncio.sleep(self._shutdown.grace_deadline(self._stop.at).remaining())

    def _enter_draining(self, _: State) -> None:
        budget = self._plan.drain_deadline(self._stop.at).remaining()
        log.info("Draining", mode=self._settings.drain, in_flight=len(self._requests), budget_s=budget)

    async def _drain(self) -> None:
        failed = self._requests.outcomes[RequestOutcome.FAILED]
        await self._shutdown.drain(self._worker.engine, self._plan.drain_deadline(self._stop.at))
        if self._found_dead is not None:
            await asyncio.sleep(_CAUSE_SECONDS)
            self._on_fatal(self._found_dead)
        elif self._requests.outcomes[RequestOutcome.FAILED] > failed:
            # They may have failed because the engine is dying, which will be reported in a moment.
            reported_by = Deadline.after(_DEATH_SECONDS)
            while self._error is None and not reported_by.passed:
                await asyncio.sleep(_CAUSE_SECONDS)

    def _enter_cleanup(self, previous: State) -> None:
        if previous is State.STARTING:
            self.reason = "stopped during the start"
            # Nothing is in flight, so the time for requests is not needed.
            self._deadline = ShutdownPlan.forced_deadline(self._stop.at)
        if self._stop.level > 1:
            self._force()
        log.info("Cleaning up worker", in_flight=len(self._requests))

    async def _clean_up(self) -> None:
        self._parts.monitors.stop()
        deadline = self._deadline or Deadline.after(self._settings.engine_shutdown_timeout)
        # Still in discovery only after a forced stop, or one during the start.
        await self._shutdown.try_to_unregister(deadline.within(_FATAL_UNREGISTER))
        await self._shutdown.end_requests(self._settings.drain.cut, "the worker is shutting down")
        frontend_failure = await self._shutdown.release(deadline)
        if frontend_failure is not None and self._exit_code == ExitCode.STOPPED:
            self.reason = f"the frontend ended before its streams did: {frontend_failure}"
            self._exit_code = ExitCode.FATAL
            log.warning("The frontend ended before its streams did", how=frontend_failure)

    def _record_fatal(self, previous: State) -> None:
        """Decide on the exit code, the reason and the time that is left."""
        error, starting = self._cause, previous is State.STARTING
        if isinstance(error, WorkerError) and (error.exit_code is not ExitCode.FATAL or not starting):
            self._exit_code = error.exit_code
        else:
            self._exit_code = ExitCode.START_FAILED if starting else ExitCode.FATAL
        self.reason = str(error.args[0]) if isinstance(error, WorkerError) else describe(error)
        self._metrics.fatal_errors.labels(type(error).__name__).inc()
        self._deadline = self._deadline.within(_FATAL_TOTAL) if self._deadline else Deadline.after(_FATAL_TOTAL)

    async def _end_after_fatal(self) -> None:
        error, deadline = self._cause, self._deadline or Deadline.after(_FATAL_TOTAL)
        self._parts.monitors.stop()
        await self._shutdown.try_to_unregister(deadline.within(_FATAL_UNREGISTER))
        # Logged only now: every millisecond in discovery brings requests that cannot be served.
        hint = {"next": error.hint} if isinstance(error, WorkerError) and error.hint else {}
        log.error(
            "Fatal error",
            kind=type(error).__name__,
            error=self.reason,
            exit_code=int(self._exit_code),
            in_flight=len(self._requests),
            **hint,
            exc_info=None if isinstance(error, WorkerError) else error,
        )
        await self._shutdown.end_requests(Cut.HANDOFF, self.reason)
        await self._plugins.on_fatal_error(self._parts.engine, error, deadline.within(_FATAL_HOOKS))
        await self._shutdown.release(deadline.within(_FATAL_CLEANUP + RUNTIME_SECONDS))

    @property
    def _cause(self) -> BaseException:
        """The error that led to the state FATAL."""
        assert self._error is not None
        return self._error

    def _enter_stopped(self, _: State) -> None:
        log.info("Worker process ends", exit_code=int(self._exit_code), reason=self.reason)
