"""The engine: starts SGLang, hands requests over, sends what comes back, and ends SGLang's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

from dynamo_worker import EngineDeadError, EngineInfo
from dynamo_worker.kit import engine_processes, translation
from dynamo_worker.kit.chunks import nothing
from dynamo_worker.kit.engine_arguments import drop_unread_events
from dynamo_worker.kit.engine_processes import EngineProcesses
from dynamo_worker.kit.publishing import LoadPublisher, publish_kv_events
from dynamo_worker.kit.push_engine import PushEngine
from dynamo_worker.logs import get_logger
from dynamo_worker_sglang import arguments, nodes
from dynamo_worker_sglang.control import Control
from dynamo_worker_sglang.disaggregation import Role
from dynamo_worker_sglang.load import LoadReader, kv_event_sources, metrics_registry
from dynamo_worker_sglang.manager import (
    KILLED_SECONDS,
    TITLE,
    GenerateRequest,
    Manager,
    Processes,
    build,
    in_lasting_thread,
    on_failed_process,
)
from dynamo_worker_sglang.outputs import Answer
from dynamo_worker_sglang.sampling import SamplingTable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from dynamo.runtime import Endpoint
    from prometheus_client import CollectorRegistry

    from dynamo_worker import Deadline, EngineContext, Request, RequestContext
    from dynamo_worker.engine import Send
    from dynamo_worker_sglang.sampling import Translated

log = get_logger(__name__)

#: Seconds that a KV transfer gets between two looks at whether it is done.
_DRAIN_POLL_SECONDS = 0.1


class SglangEngine(PushEngine):
    """SGLang as dynamo-worker drives it."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._context = context
        self._processes: Processes | None = None
        self._manager: Manager | None = None
        self._settings: dict[str, Any] = {}
        self._table: SamplingTable | None = None
        self._control: Control | None = None
        self._role: Role | None = None
        self._reader: LoadReader | None = None
        self._decode: Callable[[int], str] | None = None
        self._load = LoadPublisher()
        self._publishers: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._probe: asyncio.Task[Any] | None = None
        self._answers: dict[str, list[str]] = {}

    # ---------------------------------------------------------------------------------------------------- start

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start SGLang's processes and wait until the model is loaded.

        Everything runs in a thread: `/live` answers and a stop is heard meanwhile.
        """
        on_failed_process(self._fail)
        drop_unread_events(self._args, self._context)
        settings = await asyncio.to_thread(arguments.configure, self._args, self._context.private_dir)
        processes = await in_lasting_thread(lambda: build(settings))
        self._processes = processes
        self._settings = settings.resolved_dict()
        manager: Manager = processes.tokenizer_manager
        self._manager = manager
        manager.auto_create_handle_loop()
        self._control = Control(manager, self._context, (manager.model_path, self._settings["served_model_name"]))
        self._role = Role(self._settings["disaggregation_mode"], self._bootstrap())
        self._reader = LoadReader(manager, self._settings["page_size"])
        self._table = SamplingTable(
            {**manager.model_config.get_default_sampling_params(), **(manager.preferred_sampling_params or {})},
            self._context_length,
            manager.model_config.vocab_size,
            deterministic=self._settings["enable_deterministic_inference"],
            custom_processors=self._settings["enable_custom_logit_processor"],
        )
        tokenizer = manager.tokenizer
        if tokenizer is not None:
            self._decode = lambda token: str(tokenizer.decode([token]))
        return self._describe()

    def _fail(self) -> None:
        if self._manager is not None:
            self._manager.fail("a process of SGLang reports that it has failed")

    @property
    def _context_length(self) -> int:
        assert self._manager is not None
        # SGLang takes no prompt that fills the whole KV cache either, nor one that leaves no room for a token.
        own: int = self._manager.context_len - self._manager.num_reserved_tokens
        pool: int = self._manager.max_req_input_len + 1
        return min(own, pool)

    @property
    def ranks(self) -> range:
        """The data-parallel ranks of this engine."""
        return range(arguments.ranks(self._settings))

    def _bootstrap(self) -> tuple[str, int]:
        """Return where other workers find the bootstrap server of this one, if it has one."""
        from sglang.srt.utils.network import NetworkAddress, get_local_ip_auto

        if self._settings["dist_init_addr"]:
            host = NetworkAddress.parse(self._settings["dist_init_addr"]).resolved().host
        else:
            host = get_local_ip_auto()
        address = NetworkAddress(host, self._settings["disaggregation_bootstrap_port"])
        # An IPv6 address is put into brackets.
        return address.to_host_port_str().rsplit(":", 1)[0], address.port

    def _describe(self) -> EngineInfo:
        settings, role, control, manager = self._settings, self._role, self._control, self._manager
        assert role is not None
        assert control is not None
        assert manager is not None
        assert self._processes is not None
        tokens = self._processes._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]  # noqa: SLF001
        running = settings["max_running_requests"]
        speculative = settings["speculative_algorithm"]
        return EngineInfo(
            model_name=settings["served_model_name"],
            model_path=manager.model_path,
            endpoint_types=role.endpoint_types,
            worker_type=role.mode,
            needs=role.needs,
            context_length=self._context_length,
            vocab_size=manager.model_config.vocab_size,
            kv_block_size=self._block_size,
            total_kv_blocks=tokens // settings["page_size"],
            max_num_seqs=running,
            max_num_batched_tokens=settings["max_prefill_tokens"],
            data_parallel_start_rank=self.ranks.start,
            data_parallel_size=len(self.ranks),
            max_loras=settings["max_loras_per_batch"] if control.lora is not None else None,
            adapters=() if control.lora is None else control.lora.names(),
            bootstrap=role.bootstrap,
            runtime_config={
                # A decode worker's cache says nothing about where a prefix was computed.
                "enable_local_indexer": role.mode != "decode",
                "kv_event_publishing_enabled": bool(kv_event_sources(settings["kv_events_config"], self.ranks)[0]),
                **({"enable_eagle": True} if speculative in ("EAGLE", "EAGLE3") else {}),
            },
            endpoints=control.endpoints(),
        )

    @property
    def _block_size(self) -> int:
        """Tokens in one block as routers see it: with context parallelism the ranks share a block."""
        size: int = self._settings["page_size"] * self._settings["dcp_size"]
        return size

    # ------------------------------------------------------------------------------------------------- requests

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Hand one request to SGLang, and its tokens to ``send``."""
        manager, table, role = self._manager, self._table, self._role
        if manager is None or table is None:
            raise EngineDeadError("SGLang is not started")
        assert role is not None
        assert self._control is not None
        if manager.failure is not None:
            raise EngineDeadError(manager.failure)
        translated = table.translate(request)
        if translated is None:
            send(nothing())
            return
        meeting = role.prepare(request, translated)
        with self._control.adapter(request) as adapter:
            if meeting is not None and not request.get("_HEALTH_CHECK"):
                # The router sends the request on to a decode worker as soon as it knows where the two meet.
                send({"token_ids": [], "index": 0, "disaggregated_params": meeting})
            name = None if adapter is None else adapter.name
            await self._answer(manager, request, context, send, translated, name)

    async def _answer(
        self,
        manager: Manager,
        request: Request,
        context: RequestContext,
        send: Send,
        translated: Translated,
        adapter: str | None,
    ) -> None:
        """Have SGLang make all answers to one request."""
        numbers = range(translated.n)
        ids = [context.id()] if translated.n == 1 else [f"{context.id()}-{number}" for number in numbers]
        stop_tokens = frozenset(translation.section(request, "stop_conditions").get("stop_token_ids") or ())
        answers = [
            Answer(
                send,
                index=number,
                prompt_tokens=len(request["token_ids"]),
                stop_tokens=stop_tokens,
                top=translated.top,
                prompt_top=translated.prompt_top,
                decode=self._decode,
            )
            for number in numbers
        ]
        requests = [
            GenerateRequest(
                rid=rid,
                input_ids=request["token_ids"],
                sampling_params=dict(translated.sampling),
                stream=True,
                lora_path=adapter,
                answer=answer,
                **translated.options,
                **self._routing(request, context),
            )
            for rid, answer in zip(ids, answers, strict=True)
        ]
        self._answers[context.id()] = ids
        try:
            if len(requests) == 1:
                await manager.run(requests[0])
                return
            first = asyncio.ensure_future(manager.run(requests[0]))
            tasks = [first]
            try:
                # The others find the prompt in the KV cache then.
                begun = asyncio.ensure_future(answers[0].begun.wait())
                await asyncio.wait({first, begun}, return_when=asyncio.FIRST_COMPLETED)
                begun.cancel()
                tasks += [asyncio.ensure_future(manager.run(request)) for request in requests[1:]]
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        finally:
            self._answers.pop(context.id(), None)

    def _routing(self, request: Mapping[str, Any], context: RequestContext) -> dict[str, Any]:
        """Return what SGLang is told about where a request belongs, and who it belongs to."""
        routing = translation.section(request, "routing")
        priority = routing.get("priority")
        if priority is not None:
            # Dynamo: the highest number goes first.
            priority = translation.priority(request)
            priority = -priority if self._settings["schedule_low_priority_values_first"] else priority
        return {
            "routed_dp_rank": translation.rank("routing.dp_rank", routing.get("dp_rank"))
            if len(self.ranks) > 1
            else None,
            "disagg_prefill_dp_rank": translation.rank("routing.prefill_dp_rank", routing.get("prefill_dp_rank")),
            "priority": priority,
            "cache_salt": translation.cache_salt(request),
            "session_id": translation.session_id(request),
            "external_trace_header": context.trace_headers() if self._settings["enable_trace"] else None,
        }

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request."""
        if self._manager is not None and self._manager.failure is None:
            for rid in self._answers.get(request_id, [request_id]):
                self._manager.abort_request(rid)

    # ------------------------------------------------------------------------------------------------ lifecycle

    def processes(self) -> Iterable[int]:
        """Return the pids of all of SGLang's processes."""
        return [] if self._processes is None else engine_processes.named(TITLE)

    def canary_request(self) -> Request:
        """Return a request for one token, which needs no other worker."""
        assert self._role is not None
        assert self._manager is not None
        model = self._manager.model_config
        request = translation.canary(self._manager.tokenizer, model.hf_text_config)
        bootstrap = self._role.canary()
        if bootstrap is not None:
            request["bootstrap_info"] = bootstrap
        return request

    def progress(self) -> int:
        """Return how often the engine was seen to advance: with outputs, or while it still reads a long prompt."""
        if self._manager is None or self._reader is None:
            return 0
        self._reader.read()
        return self._manager.batches + self._reader.steps

    async def on_ready(self) -> None:
        """Let the other nodes of a spread engine know that it serves: only now may they be ready, too."""
        if self._settings["nnodes"] > 1:
            await nodes.announce(self._settings["dist_init_addr"])

    async def check_health(self) -> None:
        """Ask the scheduler for its state, and return when it has answered.

        :raises EngineDeadError: a process has failed, or nothing can be received any more.
        """
        manager = self._manager
        if manager is None:
            return
        if manager.failure is not None:
            raise EngineDeadError(manager.failure)
        # One question at a time: a second one would wait behind the first.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(manager.get_internal_state())
        await asyncio.shield(self._probe)

    async def drain(self, deadline: Deadline) -> None:
        """Wait until decode workers have fetched the KV cache that this prefill worker holds for them."""
        if self._reader is None or self._role is None or self._role.mode != "prefill":
            return
        while not deadline.passed and self._reader.in_flight():
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    # ------------------------------------------------------------------------------------- routers and operators

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:  # noqa: ARG002 - part of the protocol
        """Publish load and KV events if somebody may read them."""
        if self._reader is None or not self._context.events_wanted:
            return
        await self._load.attach(endpoint, self.ranks)
        self._tasks.append(asyncio.ensure_future(self._reader.publish(self._load)))
        sources, topic = kv_event_sources(self._settings["kv_events_config"], self.ranks)
        if sources:
            self._publishers = publish_kv_events(endpoint, self._block_size, sources, topic)

    def metrics_registry(self) -> CollectorRegistry:
        """Return SGLang's own metrics."""
        return metrics_registry()

    # --------------------------------------------------------------------------------------------------- the end

    async def shutdown(self, deadline: Deadline) -> None:
        """End SGLang's processes. They hold nothing that would have to be released in order, and ignore SIGTERM."""
        tasks = [*self._tasks, *([self._probe] if self._probe is not None else [])]
        for task in tasks:
            task.cancel()
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.fail("SGLang is shut down")
            manager.stop()
        processes, self._processes = self._processes, None
        ending = EngineProcesses(TITLE)
        ending.signal_leaders(signal.SIGKILL)
        await ending.end(KILLED_SECONDS, deadline)
        if processes is not None:
            _remove_files(processes.port_args, manager)


def _remove_files(port_args: Any, manager: Manager | None) -> None:
    """Remove the files that SGLang leaves: sockets, and the shared memory in which schedulers report their load."""
    names = [value[len("ipc://") :] for value in vars(port_args).values() if str(value).startswith("ipc://")]
    path = getattr(getattr(manager, "load_snapshot_reader", None), "path", None)
    for name in (*names, *([path] if path else [])):
        with contextlib.suppress(OSError):
            os.unlink(name)
