"""The lifecycle of an engine class: Dynamo's ``LLMEngine`` protocol on one side, the worker's on the other."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from typing import TYPE_CHECKING, Any, Final, cast

from dynamo.llm import KvEventPublisher
from prometheus_client import CollectorRegistry

from dynamo_worker import EngineDeadError, StartError, UsageError
from dynamo_worker.errors import WorkerError
from dynamo_worker.errors import describe as described
from dynamo_worker.kit import canary, engine_processes
from dynamo_worker.kit.chunks import no_tokens
from dynamo_worker.kit.engine_control import routes
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error
from dynamo_worker.kit.metrics import ComponentCollector
from dynamo_worker.kit.publishing import KvEvents, LoadPublisher, publish_kv_events
from dynamo_worker.kit.push_engine import pulled
from dynamo_worker.logs import get_logger
from dynamo_worker_dynamo import engine_class
from dynamo_worker_dynamo.answers import Answers
from dynamo_worker_dynamo.description import describe, first_token, mode
from dynamo_worker_dynamo.requests import ClassTable
from dynamo_worker_dynamo.side_effects import undone
from dynamo_worker_dynamo.telemetry import ClassMetrics, Snapshots

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping

    from dynamo.runtime import Endpoint

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Chunk, EngineContext, EngineInfo, Operation, Request, RequestContext, Send

log = get_logger(__name__)

#: Seconds that a prefill worker waits for decode workers if the class cannot tell whether they have what they need.
_DRAIN_VARIABLE: Final = "DYN_PREFILL_DRAIN_TIMEOUT_S"
_DRAIN_POLL_SECONDS: Final = 0.1
#: Looks at the processes after an error of one request, and the seconds after each.
_LOOKS, _LOOK_SECONDS = 4, 0.25
#: Seconds that a broken class gets to clean up, once its processes are dead.
_FAILED_SECONDS: Final = 2.0
#: Seconds kept for the kill of what a class leaves.
_KILL_SECONDS: Final = 0.5


class DynamoEngine(EngineLifecycle):
    """Runs one engine of a class that implements ``dynamo.common.backend.LLMEngine``.

    :ivar inner: the engine of that class; None before the start and after the shutdown.
    """

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        if args.engine_class is None:
            raise UsageError(
                "--engine-class is missing",
                hint="--engine dynamo --engine-class MODULE:CLASS, then the class's own flags",
            )
        self.path: str = args.engine_class
        self.inner: Any = None
        self._args = args
        self._context = context
        self._config: Any = None
        self._table = ClassTable(None)
        self._answers: Answers | None = None
        self._canary: dict[str, Any] = {**canary.canary_request(None, None)}
        self._load = LoadPublisher()
        self._snapshots: Snapshots | None = None
        self._metrics = ClassMetrics()
        self._gauges: ComponentCollector | None = None
        self._operations: dict[str, Operation] = {}
        self._publishers: list[KvEventPublisher] = []
        self._newcomers: engine_processes.StartedSince | None = None
        self._processes: list[Any] = []
        self._started: list[Any] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead: EngineDeadError | None = None
        self._failed = False

    # ---------------------------------------------------------------------------------------------------- the start

    async def start(self, worker_id: int) -> EngineInfo:
        """Make an engine of the class, start it, and return what it serves."""
        begun = time.monotonic()
        self._newcomers = engine_processes.StartedSince()
        made = await engine_class.make(self.path, self._args.class_arguments)
        self.inner, self._config = made
        try:
            with undone():
                registration = await self.inner.start(worker_id)
                info = await self._describe(registration)
                await self._connect(info, time.monotonic() - begun)
        except WorkerError:
            raise
        except (Exception, SystemExit) as error:
            log.error("The start of the engine class failed", exc_info=error)
            raise start_error(f"--engine-class {self.path}", described(error)) from error
        self._processes = await self._newcomers.lasting(self._args.engine_processes)
        self._started = self._newcomers.found()
        if self._args.engine_processes is not None and not self._processes:
            raise StartError(
                f"--engine-processes {self._args.engine_processes.pattern}: the class has started no such process"
            )
        return info

    async def _describe(self, registration: Any) -> EngineInfo:
        sources = await self.inner.kv_event_sources() if self._routes_by_cache() else []
        info = await asyncio.to_thread(
            describe, self.path, registration, self._config, kv_events=bool(sources and registration.llm)
        )
        payload = self._config.health_check_payload or await self.inner.health_check_payload()
        if payload is None:
            token = await asyncio.to_thread(first_token, registration.model)
            payload = {**self._canary, "token_ids": [token]}
        self._canary = {**payload, canary.MARK: True}
        return info

    async def _connect(self, info: EngineInfo, load_seconds: float) -> None:
        """Give the class what it reports to, and take what it offers."""
        self._table = ClassTable(info.context_length, self._args.refuse_fields)
        self._answers = Answers(
            self.inner, self._beside, self._die, self._stays_well, decode=info.worker_type == "decode"
        )
        await self.inner.register_prometheus(self._metrics)
        first = info.data_parallel_start_rank
        blocks = info.total_kv_blocks
        totals = {} if blocks is None else dict.fromkeys(range(first, first + info.data_parallel_size), blocks)
        self._snapshots = snapshots = Snapshots(self._load, asyncio.get_running_loop())
        self._gauges = ComponentCollector(load_seconds, totals, snapshots.used_blocks, snapshots.hit_rates)
        if self._routes_by_cache() and self.inner.component_metrics_dp_ranks():
            self.inner.attach_snapshot_publisher(snapshots)
        self._operations = {
            **{name: self._operation(self.inner.engine_control, name) for name in self.inner.supported_controls()},
            **{f"update/{n}": self._operation(self.inner.engine_update, n) for n in self.inner.supported_updates()},
        }

    @staticmethod
    def _operation(call: Any, name: str) -> Operation:
        async def operate(body: dict[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = await call(name, body)
            return answer

        return operate

    def _routes_by_cache(self) -> bool:
        """Return whether KV events and load are published: a router must read them, and the class must want it."""
        return self._context.events_wanted and bool(self._config.enable_kv_routing)

    # ------------------------------------------------------------------------------------------------- the requests

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Answer one request; see :class:`~dynamo_worker.engine.PushesChunks`."""
        answers = self._answers
        if self._dead is not None or answers is None:
            raise self._dead or EngineDeadError("the engine class is not started")
        prepared = self._table.translate(request)
        if prepared is None:
            send(no_tokens())
            return
        await answers.answer(prepared, context, send)

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Return the chunks of one request, for callers inside this process."""
        return pulled(self.push, request, context)

    async def abort(self, request_id: str) -> None:
        """Make the class end one request."""
        if self._answers is not None:
            await self._answers.abort(request_id)

    def canary_request(self) -> Request:
        """Return the class's own health check, or a request for one token if it has none."""
        request: Any = copy.deepcopy(self._canary)
        return cast("Request", request)

    # ------------------------------------------------------------------------------------------ health and processes

    def processes(self) -> Iterable[int]:
        """Return the pids of the processes that the class has started, or that the operator has named."""
        return [process.pid for process in self._processes]

    async def check_health(self) -> None:
        """Raise EngineDeadError once the class has said that it is dead, or one of its processes has died."""
        if self._dead is not None:
            raise self._dead
        gone = engine_processes.dead(self._processes)
        if gone:
            raise EngineDeadError(f"a process of the engine class has died (pid {gone[0]})")

    async def _stays_well(self) -> None:
        """Look at the class's processes for a moment; without any there is nothing to see.

        :raises EngineDeadError: one has died.
        """
        for _ in range(_LOOKS if self._processes else 0):
            await self.check_health()
            await asyncio.sleep(_LOOK_SECONDS)

    def _die(self, error: EngineDeadError) -> None:
        self._dead = self._dead or error

    def mark_failed(self) -> None:
        """Let the shutdown kill the class's processes before it asks the class."""
        self._failed = True

    # ----------------------------------------------------------------------------------------- routers and operators

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Give the class its endpoint, and publish its KV events and its load."""
        await self.inner.on_endpoint_ready(endpoint)
        if not self._routes_by_cache():
            return
        if self.inner.component_metrics_dp_ranks():
            await self._load.attach(endpoint, self.inner.component_metrics_dp_ranks())
        if info.kv_block_size is None:
            return
        for source in await self.inner.kv_event_sources():
            self._publish(endpoint, source, info.kv_block_size, local=bool(info.runtime_config["enable_local_indexer"]))

    def _publish(self, endpoint: Endpoint, source: Any, block_size: int, *, local: bool) -> None:
        from dynamo.common.backend.publisher import PushSource

        if not isinstance(source, PushSource):
            events = KvEvents({source.dp_rank: source.endpoint}, source.topic, block_size)
            self._publishers += publish_kv_events(endpoint, events)
            return
        publisher = KvEventPublisher(
            endpoint=endpoint, kv_block_size=block_size, dp_rank=source.dp_rank, enable_local_indexer=local
        )
        self._publishers.append(publisher)
        source.on_ready(publisher)

    def metrics_registry(self) -> CollectorRegistry:
        """Return the metrics of the class, and Dynamo's gauges about its model and its KV cache."""
        registry = CollectorRegistry()
        registry.register(self._metrics)
        if self._gauges is not None:
            registry.register(self._gauges)
        return registry

    def control_routes(self) -> Mapping[str, Operation]:
        """Return the class's controls, and its updates below ``update/``."""
        return routes(self._operations)

    # -------------------------------------------------------------------------------------------------------- the end

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, deadline: Deadline) -> None:
        """Wait on a prefill worker until the class says that decode workers have fetched their KV blocks."""
        if self.inner is None or mode(self._config) != "prefill":
            return
        limit = deadline.within(_seconds(os.environ.get(_DRAIN_VARIABLE)))
        while not limit.passed and not await self.inner.is_quiescent():
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    async def shutdown(self, deadline: Deadline) -> None:
        """Let the class clean up, which also follows a start that has failed, and kill the processes that it leaves."""
        inner, self.inner, self._answers = self.inner, None, None
        for task in list(self._tasks):
            task.cancel()
        if self._failed:
            await self._kill(deadline)
        if inner is not None:
            try:
                limit = deadline.within(_FAILED_SECONDS) if self._failed else deadline.reserve(_KILL_SECONDS)
                await asyncio.wait_for(inner.cleanup(), limit.remaining())
            except asyncio.TimeoutError:
                log.info("The engine's own shutdown takes too long", engine=self.path, next="kill its processes")
            except Exception as error:
                log.warning(
                    "The engine's own shutdown failed", engine=self.path, error=error, next="kill its processes"
                )
        self._publishers.clear()
        await self._kill(deadline)

    async def _kill(self, deadline: Deadline) -> None:
        if self._newcomers is not None:
            await engine_processes.kill(self._newcomers.found() if self._started is None else self._started, deadline)


def _seconds(text: str | None) -> float:
    """Return a number of seconds from the environment; infinity without one."""
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")
