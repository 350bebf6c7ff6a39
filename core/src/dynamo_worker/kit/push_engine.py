"""The base class of engines that push chunks: what surrounds an engine's own start, requests, drain and shutdown.

An engine derives from :class:`PushEngine` and adds the rest: how it launches, what it tells routers, and how it answers
a translated request.
"""

from __future__ import annotations

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from dynamo_worker.containment import contained
from dynamo_worker.errors import EngineDeadError, StartError
from dynamo_worker.kit import engine_processes, forward_pass_metrics
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.kit.chunks import no_tokens
from dynamo_worker.kit.engine_arguments import drop_unread_events
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error
from dynamo_worker.kit.kv_events import KvEventSource
from dynamo_worker.kit.metrics import ComponentCollector, engine_registry
from dynamo_worker.kit.publishing import LoadPublisher, publish_kv_events

if TYPE_CHECKING:
    import argparse
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Mapping,
        Sequence,
    )

    from dynamo.llm import KvEventPublisher
    from dynamo.runtime import Endpoint
    from prometheus_client import CollectorRegistry

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Chunk, EngineContext, EngineInfo, Operation, Request, RequestContext, Send
    from dynamo_worker.kit.disaggregation import Role
    from dynamo_worker.kit.engine_control import EngineControl
    from dynamo_worker.kit.lora import LoraAdapter
    from dynamo_worker.kit.publishing import KvEvents
    from dynamo_worker.kit.translation import ModelTable
    from dynamo_worker.supervisor.linux import Process

#: Seconds between two checks whether a prefill worker's KV blocks have been fetched.
_DRAIN_POLL_SECONDS = 0.1
#: Looks at the engine's health after it has failed a request, and the seconds after each.
_LOOKS, _LOOK_SECONDS = 4, 0.25

_T = TypeVar("_T")


@dataclass
class Started:
    """The parts of an engine that exist from its launch to its shutdown; each engine adds its own.

    :ivar table: translates requests.
    :ivar role: the phase of each request that this worker runs.
    :ivar control: the operations, LoRA adapters included.
    """

    table: ModelTable[Any]
    role: Role
    control: EngineControl


StartedT = TypeVar("StartedT", bound=Started)


class Job(NamedTuple):
    """One request that an engine is to answer.

    :param request: as Dynamo sent it.
    :param params: what the engine's table and role made of it.
    :param lora: its LoRA adapter; None for the model itself.
    :param context: its id and trace headers.
    :param send: takes the chunks.
    """

    request: Request
    params: Any
    lora: LoraAdapter | None
    context: RequestContext
    send: Send


class PushEngine(EngineLifecycle, ABC, Generic[StartedT]):
    """An engine that implements :class:`~dynamo_worker.engine.PushesChunks`.

    Its command line has ``--publish-kv-events`` (:func:`~dynamo_worker.kit.engine_arguments.add_publish_kv_events`).

    :ivar worker_id: the Dynamo instance id of this worker, from the start on.
    :ivar load: what the engine reports about its KV cache.
    :ivar at_stop: functions that :meth:`stop` calls, such as that of a :class:`~dynamo_worker.kit.blocking.Poller`.
    """

    #: The engine's name in messages.
    NAME: ClassVar[str]
    #: How the names of the engine's own metrics begin.
    METRICS: ClassVar[Sequence[str]] = ()

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self.args = args
        self.context = context
        self.worker_id = 0
        self.load = LoadPublisher()
        self.at_stop: list[Callable[[], object]] = []
        self._stopping = self._failed = False
        self._started: StartedT | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishers: list[KvEventPublisher] = []
        self._gauges: ComponentCollector | None = None
        self._ranks = range(1)

    # ------------------------------------------------------------------------------ methods for engines to implement

    @abstractmethod
    async def launch(self) -> StartedT:
        """Start the engine's processes and wait until the model is loaded.

        :raises StartError: the engine cannot start here.
        """

    async def warm_up(self) -> None:
        """Make requests of kinds that are slow the first time; the worker's own warm-up request follows."""

    @abstractmethod
    def describe(self, started: StartedT) -> EngineInfo:
        """Return what the engine knows about the model and its memory.

        The rest, about the role, the operations, LoRA adapters and KV events, is added by :meth:`start`.
        """

    @abstractmethod
    async def answer(self, started: StartedT, job: Job) -> None:
        """Send all chunks of one request."""

    def kv_events(self, started: StartedT) -> KvEvents | KvEventSource | None:  # noqa: ARG002 - for some
        """Return where the engine publishes its KV events, or how it hands them out; None if it does neither."""
        return None

    def reports_load(self) -> bool:
        """Return whether the engine fills :attr:`load`."""
        return True

    def used_blocks(self) -> Mapping[int, int]:
        """Return the KV blocks in use on each data-parallel rank that reports them; called in a thread, for metrics."""
        return {**dict.fromkeys(self._ranks, 0), **self.load.used_blocks()} if self.reports_load() else {}

    def hit_rates(self) -> Mapping[int, float]:
        """Return which part of the prompts' tokens each rank's KV cache had; called in a thread, for metrics."""
        return {}

    def pending_transfers(self, started: StartedT) -> int:  # noqa: ARG002 - for engines that transfer KV blocks
        """Return how much a prefill worker still holds for decode workers; 0 ends its drain."""
        return 0

    # --------------------------------------------------------------------------------------------- start and requests

    @property
    def started(self) -> StartedT:
        """The parts of the running engine.

        :raises EngineDeadError: it is not started, or has been shut down.
        """
        if self._started is None:
            raise EngineDeadError(f"{self.NAME} is not started")
        return self._started

    async def start(self, worker_id: int) -> EngineInfo:
        """Launch the engine, warm it up, and return what it serves."""
        self.worker_id = worker_id
        drop_unread_events(self.args, self.context)
        begun = time.monotonic()
        self._started = started = await self.launch()
        load_seconds = time.monotonic() - begun
        await self.warm_up()
        info, lora = self.describe(started), started.control.lora
        self._ranks = _ranks(info)
        blocks = {} if info.total_kv_blocks is None else dict.fromkeys(self._ranks, info.total_kv_blocks)
        self._gauges = ComponentCollector(load_seconds, blocks, self.used_blocks, self.hit_rates)
        return replace(
            info,
            endpoint_types=started.role.endpoint_types,
            worker_type=started.role.mode,
            needs=started.role.needs,
            lora_adapters=() if lora is None else lora.names(),
            runtime_config={
                # A decode worker's cache says nothing about where a prefix was computed.
                "enable_local_indexer": started.role.mode != "decode",
                "kv_event_publishing_enabled": self.kv_events(started) is not None,
                **info.runtime_config,
            },
            endpoints=started.control.endpoints(),
        )

    async def construct(self, build: Callable[[], _T], processes: Callable[[], Iterable[Process]] = tuple) -> _T:
        """Build the engine in a thread: that takes minutes and cannot be interrupted. The thread stays.

        :param build: starts the engine's processes and waits until the model is loaded.
        :param processes: returns those started so far, for engines that may not notice that one has died.
        :raises StartError: the engine fails to start.
        """
        hook = sys.excepthook
        try:
            return await engine_processes.while_alive(in_thread(build, name="engine-start", lasting=True), processes)
        except Exception as error:
            if self._stopping:
                raise StartError("stopped during the start") from error
            cause = f": {error.__cause__}" if error.__cause__ is not None else ""
            raise start_error(self.NAME, f"{error}{cause}") from error
        finally:
            sys.excepthook = hook  # an engine's own may wait for its processes before an error ends this one

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Translate one request and answer it; see :class:`~dynamo_worker.engine.PushesChunks`."""
        started = self.started
        params = started.table.translate(request)
        if params is None:
            send(no_tokens())
            return
        started.role.prepare(request, params)
        send = started.role.with_prefill_usage(request, send)
        with started.control.lora_adapter(request) as lora:
            await self.answer(started, Job(request, params, lora, context, send))

    async def stays_well(self) -> None:
        """Check the engine's health for a moment: the failure of one request may be the first sign of a broken engine.

        Otherwise the request would come back to this worker until its migrations are used up.

        :raises EngineDeadError: the engine is broken.
        """
        for _ in range(_LOOKS):
            await self.check_health()
            await asyncio.sleep(_LOOK_SECONDS)

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Return the chunks of one request, for callers inside this process."""
        return pulled(self.push, request, context)

    # ------------------------------------------------------------------------------------------ routers and operators

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Publish load and KV events if a router may read them, and what the schedulers publish for the planner."""
        for relay in forward_pass_metrics.relay(endpoint, self.context.private_dir):
            self.at_stop.append(relay.shutdown)
        if not self.context.events_wanted:
            return
        if self.reports_load():
            await self.load.attach(endpoint, _ranks(info))
        events = self.kv_events(self.started)
        if isinstance(events, KvEventSource):
            self.at_stop.append(events.forward(endpoint).stop)
        elif events is not None:
            self._publishers = publish_kv_events(endpoint, events)

    def metrics_registry(self) -> CollectorRegistry:
        """Return the engine's own metrics, and Dynamo's gauges about its model and its KV cache."""
        registry = engine_registry(*self.METRICS)
        if self._gauges is not None:
            registry.register(self._gauges)
        return registry

    def control_routes(self) -> Mapping[str, Operation]:
        """Return the operations under ``/engine/NAME``."""
        return {} if self._started is None else self._started.control.routes()

    def paused(self) -> bool:
        """Return whether an operator has taken the engine out of service."""
        return self._started is not None and self._started.control.paused()

    # -------------------------------------------------------------------------------------------------------- the end

    def run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the requests until the engine shuts down."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, deadline: Deadline) -> None:
        """Wait until decode workers have fetched the KV blocks that a prefill worker holds for them."""
        started = self._started
        if started is None or started.role.mode != "prefill":
            return
        while not deadline.passed and self.pending_transfers(started):
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    def mark_failed(self) -> None:
        """Let the shutdown kill the engine's processes without asking them first."""
        self._failed = True

    def stop(self) -> StartedT | None:
        """Refuse requests from now on, end what runs beside, and return the parts that :meth:`shutdown` has to end."""
        for function in self.at_stop:
            function()
        for task in self._tasks:
            task.cancel()
        self._stopping = True
        started, self._started = self._started, None
        return started


def _ranks(info: EngineInfo) -> range:
    first = info.data_parallel_start_rank
    return range(first, first + info.data_parallel_size)


async def pulled(
    push: Callable[[Request, RequestContext, Send], Awaitable[None]], request: Request, context: RequestContext
) -> AsyncGenerator[Chunk, None]:
    """Yield what an engine pushes (:class:`~dynamo_worker.engine.PushesChunks`): its ``generate`` in one line."""
    chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
    task = asyncio.ensure_future(contained(lambda: push(request, context, chunks.put_nowait)))
    task.add_done_callback(lambda _: chunks.put_nowait(None))
    try:
        while (chunk := await chunks.get()) is not None:
            yield chunk
        await task
    finally:
        task.cancel()
