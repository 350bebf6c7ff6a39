"""The engine: starts SGLang, hands requests over, sends the outputs, and ends SGLang's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dynamo_worker import EngineDeadError, EngineInfo, StartError
from dynamo_worker.kit import engine_processes, push_engine, request_metadata
from dynamo_worker.kit.blocking import OneAtATime
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.kit.chunks import token_decoder
from dynamo_worker.kit.fields import section
from dynamo_worker.kit.push_engine import Job, PushEngine
from dynamo_worker_sglang import arguments, load, nodes
from dynamo_worker_sglang.control import Control
from dynamo_worker_sglang.disaggregation import Role
from dynamo_worker_sglang.load import LoadReader
from dynamo_worker_sglang.manager import (
    GenerateRequest,
    Manager,
    Processes,
    build,
    on_failed_process,
)
from dynamo_worker_sglang.outputs import Answer
from dynamo_worker_sglang.processes import KILLED_SECONDS, TITLE
from dynamo_worker_sglang.runtime_data import runtime_data, uses_eagle
from dynamo_worker_sglang.sampling import SamplingTable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from dynamo.runtime import Endpoint
    from prometheus_client import CollectorRegistry

    from dynamo_worker import Deadline, EngineContext, Request, RequestContext
    from dynamo_worker.kit.publishing import KvEvents
    from dynamo_worker_sglang.sampling import Translated


@dataclass
class Started(push_engine.Started):
    """The parts of a started SGLang.

    :ivar settings: SGLang's settings, with all defaults resolved.
    :ivar reader: reads the schedulers' load.
    :ivar decode: returns the text of a token.
    """

    role: Role
    control: Control
    manager: Manager
    settings: Mapping[str, Any]
    reader: LoadReader
    decode: Callable[[int], str | None]

    @property
    def ranks(self) -> range:
        """The data-parallel ranks of this engine: one for each KV cache.

        SGLang 0.5.23 has a separate setting for the ranks of data-parallel attention, which 0.5.21 counts in `dp_size`.
        """
        return range(self.settings["dp_size"] * (self.settings.get("attn_dp_size") or 1))

    @property
    def block_size(self) -> int:
        """Tokens in one block as routers see it: with context parallelism the ranks share a block."""
        return int(self.settings["page_size"] * self.settings["dcp_size"])


class SglangEngine(PushEngine[Started]):
    """SGLang as dynamo-worker drives it."""

    NAME: ClassVar = "SGLang"
    ROLE: ClassVar = Role

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args, context)
        #: Set before the start is complete: their files must be removed even if the rest of it fails.
        self._processes: Processes | None = None
        #: A second question would queue behind the first.
        self._state = OneAtATime(lambda: self.started.manager.get_internal_state())
        #: SGLang's ids of each request's answers.
        self._answers: dict[str, list[str]] = {}

    async def launch(self) -> Started:
        """Start SGLang's processes and wait until the model is loaded.

        The work runs in threads: meanwhile `/live` answers and signals are handled.
        """
        on_failed_process(self._fail)
        arguments.measure_forward_passes(self.args, self.worker_id, self.context.private_dir)
        config = await asyncio.to_thread(arguments.configure, self.args, self.context.private_dir)
        self._processes = await build(config)
        settings = config.resolved_dict()
        manager: Manager = self._processes.tokenizer_manager
        manager.auto_create_handle_loop()
        self.check(manager)
        table = SamplingTable(
            {**manager.model_config.get_default_sampling_params(), **(manager.preferred_sampling_params or {})},
            context_length(manager),
            manager.model_config.vocab_size,
            deterministic=settings["enable_deterministic_inference"],
            custom_processors=settings["enable_custom_logit_processor"],
        )
        return Started(
            table,
            self.ROLE(settings["disaggregation_mode"], _bootstrap(settings)),
            Control(
                manager,
                self.context,
                (manager.model_path, settings["served_model_name"]),
                trainers=self.args.enable_rl,
            ),
            manager,
            settings,
            LoadReader(manager, settings["page_size"]),
            token_decoder(manager.tokenizer),
        )

    def check(self, manager: Manager) -> None:
        """Check that the model is of this engine's kind.

        :raises StartError: it does not generate.
        """
        if not manager.is_generation:
            raise StartError(
                f"{manager.model_path} generates nothing", hint="--embedding-worker serves the embeddings of a model"
            )

    def _fail(self) -> None:
        if self._processes is not None:
            self._processes.tokenizer_manager.fail("a process of SGLang reports that it has failed")

    def describe(self, started: Started) -> EngineInfo:
        """Return the model's properties and the size of the KV cache that SGLang has allocated."""
        settings, role, manager = started.settings, started.role, started.manager
        assert self._processes is not None
        tokens = self._processes._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]  # noqa: SLF001
        longest = context_length(manager)
        return EngineInfo(
            model_name=settings["served_model_name"],
            model_aliases=self.args.served_model_aliases,
            model_path=manager.model_path,
            context_length=longest,
            vocab_size=manager.model_config.vocab_size,
            kv_block_size=started.block_size,
            total_kv_blocks=tokens // settings["page_size"],
            max_num_seqs=settings["max_running_requests"],
            max_num_batched_tokens=settings["max_prefill_tokens"],
            data_parallel_start_rank=started.ranks.start,
            data_parallel_size=len(started.ranks),
            max_loras=settings["max_loras_per_batch"] if manager.enable_lora else None,
            bootstrap=role.bootstrap,
            runtime_config={"enable_eagle": uses_eagle(settings["speculative_algorithm"])},
            runtime_data=runtime_data(settings, longest, manager.tokenizer),
        )

    async def on_ready(self) -> None:
        """Tell the other nodes of a multi-node engine that it serves: only now may they report ready.

        The hook has a time limit and is called once, so the task outlives it.
        """
        settings = self.started.settings
        if settings["nnodes"] > 1:
            self.run_beside(nodes.announce(settings["dist_init_addr"]))

    async def answer(self, started: Started, job: Job) -> None:
        """Let SGLang make all answers to one request."""
        manager, request, request_id = started.manager, job.request, job.context.id()
        translated: Translated = job.params
        if manager.failure is not None:
            raise EngineDeadError(manager.failure)
        await started.control.admit()
        if translated.meeting is not None:
            # The router forwards the request to a decode worker as soon as it knows where the two meet.
            job.send({"token_ids": [], "index": 0, "disaggregated_params": translated.meeting})
        numbers = range(translated.n)
        ids = [request_id] if translated.n == 1 else [f"{request_id}-{number}" for number in numbers]
        stop_tokens = frozenset(section(request, "stop_conditions").get("stop_token_ids") or ())
        answers = [
            Answer(
                job.send,
                index=number,
                prompt_tokens=len(request["token_ids"]),
                stop_tokens=stop_tokens,
                top=translated.top,
                prompt_top=translated.prompt_top,
                decode=started.decode,
            )
            for number in numbers
        ]
        requests = [
            GenerateRequest(
                rid=rid,
                input_ids=request["token_ids"],
                sampling_params=dict(translated.sampling),
                stream=True,
                lora_path=None if job.lora is None else job.lora.name,
                answer=answer,
                **translated.options,
                **_routing(started, request, job.context),
            )
            for rid, answer in zip(ids, answers, strict=True)
        ]
        self._answers[request_id] = ids
        try:
            if len(requests) == 1:
                await manager.run(requests[0])
                return
            first = asyncio.ensure_future(manager.run(requests[0]))
            tasks = [first]
            try:
                # Once the first answer has begun, the others find the prompt in the KV cache.
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
            self._answers.pop(request_id, None)

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request."""
        if self._started is not None and self._started.manager.failure is None:
            for rid in self._answers.get(request_id, [request_id]):
                self._started.manager.abort_request(rid)

    def processes(self) -> Iterable[int]:
        """Return the pids of all of SGLang's processes."""
        return [] if self._processes is None else engine_processes.named(TITLE)

    def canary_request(self) -> Request:
        """Return a request for one token, which needs no other worker."""
        manager, role = self.started.manager, self.started.role
        request = canary_request(manager.tokenizer, manager.model_config.hf_text_config)
        bootstrap = role.canary()
        if bootstrap is not None:
            request["bootstrap_info"] = bootstrap
        return request

    def progress(self) -> int:
        """Return the number of batches of outputs and of scheduler steps; the latter grow during a long prefill."""
        if self._started is None:
            return 0
        self._started.reader.read()
        return self._started.manager.batches + self._started.reader.steps

    async def check_health(self) -> None:
        """Ask the scheduler for its state, and return when it has answered.

        :raises EngineDeadError: a process has failed, or no more outputs can be received.
        """
        if self._started is None:
            return
        if self._started.manager.failure is not None:
            raise EngineDeadError(self._started.manager.failure)
        self._started.control.weights.check_alive()
        await self._state.answer()

    def pending_transfers(self, started: Started) -> int:
        """Return the number of requests whose KV cache decode workers have not fetched yet."""
        return started.reader.in_flight()

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Publish load and KV events if a router may read them; the load is polled."""
        await super().attach(endpoint, info)
        if self.context.events_wanted:
            self.run_beside(self.started.reader.publish(self.load))

    def kv_events(self, started: Started) -> KvEvents | None:
        """Return where SGLang's ranks publish."""
        return load.kv_events(started.settings["kv_events_config"], started.ranks, started.block_size)

    def metrics_registry(self) -> CollectorRegistry:
        """Return SGLang's own metrics, and Dynamo's gauges about its model and its KV cache."""
        registry = super().metrics_registry()
        if self.started.settings["enable_metrics"]:
            load.add_metrics(registry)
        return registry

    def used_blocks(self) -> Mapping[int, int]:
        """Return the KV blocks in use on each data-parallel rank."""
        return {} if self._started is None else self._started.reader.used_blocks()

    async def shutdown(self, deadline: Deadline) -> None:
        """Kill SGLang's processes: they hold nothing that needs an orderly shutdown, and ignore SIGTERM."""
        self._state.cancel()
        self.stop()
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.tokenizer_manager.fail("SGLang is shut down")
            processes.tokenizer_manager.stop()
        await engine_processes.end(TITLE, signal.SIGKILL, KILLED_SECONDS, deadline)
        if processes is not None:
            processes.close()
            _remove_files(processes)


def context_length(manager: Manager) -> int:
    """Return the longest sequence that SGLang accepts: it needs room for a token, and in the KV cache too."""
    return int(min(manager.context_len - manager.num_reserved_tokens, manager.max_req_input_len + 1))


def _bootstrap(settings: Mapping[str, Any]) -> tuple[str, int]:
    """Return where other workers find the bootstrap server of this one, if it has one."""
    from sglang.srt.utils.network import NetworkAddress, get_local_ip_auto

    if settings["dist_init_addr"]:
        host = NetworkAddress.parse(settings["dist_init_addr"]).resolved().host
    else:
        host = get_local_ip_auto()
    address = NetworkAddress(host, settings["disaggregation_bootstrap_port"])
    # This puts an IPv6 address into brackets.
    return address.to_host_port_str().rsplit(":", 1)[0], address.port


def _routing(started: Started, request: Mapping[str, Any], context: RequestContext) -> dict[str, Any]:
    """Return a request's ranks, priority, session, cache salt and trace as arguments of ``GenerateReqInput``."""
    settings = started.settings
    priority = request_metadata.priority(request)  # Dynamo: the highest number goes first
    if priority is not None and settings["schedule_low_priority_values_first"]:
        priority = -priority
    rank = request_metadata.dp_rank(request)
    return {
        "routed_dp_rank": rank if len(started.ranks) > 1 else None,
        "disagg_prefill_dp_rank": request_metadata.prefill_dp_rank(request),
        "priority": priority,
        "cache_salt": request_metadata.cache_salt(request),
        "session_id": request_metadata.session_id(request),
        "external_trace_header": context.trace_headers() if settings["enable_trace"] else None,
    }


def _remove_files(processes: Processes) -> None:
    """Remove the files that SGLang leaves: sockets, and the shared memory in which schedulers report their load."""
    values = map(str, vars(processes.port_args).values())
    names = [value[len("ipc://") :] for value in values if value.startswith("ipc://")]
    path = getattr(getattr(processes.tokenizer_manager, "load_snapshot_reader", None), "path", None)
    for name in (*names, *([path] if path else [])):
        with contextlib.suppress(OSError):
            os.unlink(name)
