"""The engine: starts vLLM, hands requests over, streams what comes back, and ends vLLM's processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from vllm import envs, exceptions
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError, StartError
from dynamo_worker.engine import LocalContext
from dynamo_worker.kit import engine_processes, translation
from dynamo_worker.kit.chunks import nothing
from dynamo_worker.kit.engine_arguments import drop_unread_events
from dynamo_worker.kit.engine_processes import EngineProcesses
from dynamo_worker.kit.publishing import LoadPublisher, publish_kv_events
from dynamo_worker.kit.push_engine import PushEngine
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import arguments, outputs, sampling
from dynamo_worker_vllm.control import Control, LoraLoader
from dynamo_worker_vllm.disaggregation import Role
from dynamo_worker_vllm.load import kv_event_sources, metrics_registry, stat_logger
from dynamo_worker_vllm.outputs import FINISH_REASONS, OutputReader
from dynamo_worker_vllm.processes import TITLE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from dynamo.runtime import Endpoint
    from prometheus_client import CollectorRegistry
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from dynamo_worker import Chunk, Deadline, EngineContext, Request, RequestContext
    from dynamo_worker.engine import Send
    from dynamo_worker.kit.lora import LoraAdapter
    from dynamo_worker_vllm.outputs import DeltaProcessor

log = get_logger(__name__)

#: Seconds between two lines of vLLM about its own load.
_LOG_STATS_SECONDS = 10.0
#: Seconds that vLLM's processes get to end by themselves. Nothing is in flight any more; what they release takes
#: milliseconds, but their interpreters take another 3 s to end (measured).
_TERMINATE_SECONDS = 1.0
#: Constraints of requests that are looked at side by side.
_GUIDE_THREADS = 2
#: Requests that make vLLM compile what a first request would otherwise wait for: 13 s for the sampler on a CPU
#: (measured).
_WARM_UP: tuple[dict[str, Any], ...] = (
    {"sampling_options": {"temperature": 1.0, "top_p": 0.9, "top_k": 10}, "output_options": {"logprobs": 1}},
    {"sampling_options": {"temperature": 1.0}},
)


class VllmEngine(PushEngine):
    """vLLM as dynamo-worker drives it."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._context = context
        self._llm: AsyncLLM | None = None
        self._config: VllmConfig | None = None
        self._processor: DeltaProcessor | None = None
        self._table: sampling.SamplingTable | None = None
        self._decode: Callable[[int], str] | None = None
        self._load = LoadPublisher()
        self._control: Control | None = None
        self._role: Role | None = None
        self._publishers: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._condemned = False
        #: Compiles the constraints of requests, to see whether they are right.
        self._guides = ThreadPoolExecutor(_GUIDE_THREADS, thread_name_prefix="guides")

    # ---------------------------------------------------------------------------------------------------- start

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start vLLM's processes and wait until the model is loaded.

        Everything runs in a thread: `/live` answers and a stop is heard meanwhile.
        """
        # Sockets between vLLM's processes; their default place outlives a worker without supervisor.
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(self._context.private_dir))
        drop_unread_events(self._args, self._context)
        config = await asyncio.to_thread(arguments.configure, self._args, self._context.private_dir)
        self._config = config
        llm = await asyncio.to_thread(self._build, config)
        self._llm = llm
        self._processor = outputs.install(llm)
        self._role = Role(self._args.disaggregation_mode, config)
        self._control = Control(llm, self._context, (config.model_config.model, *self._served_names))
        self._table = sampling.SamplingTable(config.model_config.get_diff_sampling_param(), self._context_length)
        tokenizer = llm.tokenizer
        if tokenizer is not None:
            self._decode = lambda token: str(tokenizer.decode([token]))
        if llm.logger_manager is not None:
            self._tasks.append(asyncio.ensure_future(self._log_stats(llm)))
        await self._warm_up()
        # vLLM asks for its environment variables with every token; from now on they stay as they are.
        envs.enable_envs_cache()
        return self._describe()

    async def _warm_up(self) -> None:
        """Compile what samples; the worker's own warm-up request is greedy."""
        for number, request in enumerate(_WARM_UP):
            warm_up = self.canary_request()
            warm_up["stop_conditions"] = {"max_tokens": 2, "ignore_eos": True}
            warm_up["sampling_options"] = request["sampling_options"]
            warm_up["output_options"] = request.get("output_options", {})
            async for _ in self.generate(warm_up, LocalContext(f"warm-up-{number}")):
                pass

    def _build(self, config: VllmConfig) -> AsyncLLM:
        try:
            return AsyncLLM.from_vllm_config(
                config,
                enable_log_requests=self._args.enable_log_requests,
                disable_log_stats=self._args.disable_log_stats,
                aggregate_engine_logging=self._args.aggregate_engine_logging,
                stat_loggers=None if self._args.disable_log_stats else [stat_logger(self._load)],
            )
        except Exception as error:
            if self._stopping:
                raise StartError("stopped during the start") from error
            raise StartError(f"vLLM does not start: {error}", hint="its own messages stand above this line") from error

    @property
    def _served_names(self) -> list[str]:
        """The names under which clients ask for the model; the first one is its own."""
        assert self._config is not None
        served = self._args.served_model_name or self._config.model_config.served_model_name
        return [served] if isinstance(served, str) else list(served)

    @property
    def _context_length(self) -> int:
        assert self._config is not None
        length: int = self._config.model_config.max_model_len
        return length

    @property
    def _vocab_size(self) -> int:
        """The first token id that vLLM refuses: some models know more of them than their tokenizer, some fewer."""
        assert self._config is not None
        size: int = self._config.model_config.get_vocab_size()
        tokenizer = None if self._llm is None else self._llm.tokenizer
        return size if tokenizer is None else max(size, tokenizer.max_token_id + 1)

    def _describe(self) -> EngineInfo:
        config, role, control = self._config, self._role, self._control
        assert config is not None
        assert role is not None
        assert control is not None
        name, *aliases = self._served_names
        ranks = self.ranks
        blocks = config.cache_config.num_gpu_blocks
        events = config.kv_events_config
        return EngineInfo(
            model_name=name,
            model_path=config.model_config.model,
            model_aliases=aliases,
            endpoint_types=role.endpoint_types,
            worker_type=role.mode,
            needs=role.needs,
            context_length=self._context_length,
            vocab_size=self._vocab_size,
            kv_block_size=config.cache_config.block_size,
            total_kv_blocks=blocks // len(ranks) if blocks else None,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            data_parallel_start_rank=ranks[0],
            data_parallel_size=len(ranks),
            max_loras=None if config.lora_config is None else config.lora_config.max_loras,
            runtime_config={
                "enable_local_indexer": True,
                "kv_event_publishing_enabled": events is not None and events.enable_kv_cache_events,
            },
            endpoints=control.endpoints(),
        )

    @property
    def ranks(self) -> list[int]:
        """The data-parallel ranks served here."""
        assert self._llm is not None
        return list(self._llm.engine_core.engine_ranks_managed)

    @staticmethod
    async def _log_stats(llm: AsyncLLM) -> None:
        while True:
            await asyncio.sleep(_LOG_STATS_SECONDS)
            await llm.do_log_stats()

    # ------------------------------------------------------------------------------------------------- requests

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Hand one request to vLLM, and its tokens to ``send``."""
        llm, table = self._llm, self._table
        if llm is None or table is None:
            raise EngineDeadError("vLLM is not started")
        assert self._role is not None
        assert self._control is not None
        params = table.translate(request)
        if params is None:
            send(nothing())
            return
        self._role.prepare(request, params)
        with self._control.adapter(request) as adapter:
            mailbox = await self._submit(llm, request, params, context, adapter)
            await self._answer(mailbox, request, params, send)

    async def _answer(self, mailbox: Any, request: Request, params: SamplingParams, send: Send) -> None:
        """Send what arrives in a request's mailbox, until it is complete."""
        disconnect = None if self._processor is None else self._processor.connect(mailbox, send)
        reader: OutputReader | None = None
        try:
            while True:
                output = mailbox.output
                if output is None:
                    await mailbox.ready.wait()
                    continue
                mailbox.output = None
                mailbox.ready.clear()
                if isinstance(output, BaseException):
                    raise _translated(output)
                if type(output) is dict:
                    send(self._completed(output, params))
                    if "finish_reason" in output:
                        return
                    continue
                if reader is None:
                    reader = OutputReader(len(request["token_ids"]), params.num_logprobs, self._decode)
                for chunk in reader.read(output):
                    send(self._completed(chunk, params))
                if output.finished:
                    return
        finally:
            if disconnect is not None:
                disconnect()

    def _completed(self, chunk: Any, params: SamplingParams) -> Chunk:
        """Return a chunk with what Dynamo wants to know when it is the last one."""
        assert self._role is not None
        self._role.hand_over(chunk, params)
        return _finished(chunk)

    async def _submit(
        self,
        llm: AsyncLLM,
        request: Request,
        params: SamplingParams,
        context: RequestContext,
        adapter: LoraAdapter | None,
    ) -> Any:
        """Give a request to vLLM and return the mailbox of its outputs."""
        try:
            if isinstance(params, sampling.GuidedParams):
                config = llm.vllm_config
                await asyncio.get_running_loop().run_in_executor(
                    self._guides,
                    params.verify_guide,
                    config.model_config,
                    config.structured_outputs_config,
                    llm.tokenizer,
                )
            return await llm.add_request(
                context.id(),
                tokens_input(request["token_ids"], cache_salt=translation.cache_salt(request)),
                params,
                lora_request=None if adapter is None else LoraLoader.request(adapter),
                trace_headers=context.trace_headers(),
                priority=-translation.priority(request),  # vLLM: the lowest number goes first
                session_id=translation.session_id(request),
                data_parallel_rank=self._rank(request),
                kv_hints=sampling.kv_hints(request),
                **sampling.reasoning(request),
            )
        except ValueError as error:  # beside errors of its own this is how vLLM refuses a request
            raise InvalidRequestError(str(error)) from error
        except Exception as error:
            raise _translated(error) from error

    def _rank(self, request: Mapping[str, Any]) -> int | None:
        """Return the data-parallel rank the router chose, counted from the first one here."""
        rank = translation.rank("routing.dp_rank", translation.section(request, "routing").get("dp_rank"))
        ranks = self.ranks
        if rank is None or len(ranks) == 1:
            return None
        return ranks.index(rank) if rank in ranks else None

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request."""
        if self._llm is not None and not self._llm.errored:
            await self._llm.abort(request_id)

    # ------------------------------------------------------------------------------------------------ lifecycle

    def processes(self) -> Iterable[int]:
        """Return the pids of all of vLLM's processes."""
        if self._llm is None:
            return []
        # The EngineCores are children of this process, whether or not they could name themselves.
        cores = (child.pid for child in multiprocessing.active_children() if child.pid is not None)
        return {*cores, *engine_processes.named(TITLE)}

    def canary_request(self) -> Request:
        """Return a request for one token.

        Its prompt has two: vLLM's ExampleConnector miscounts the blocks of a prompt of one (0.31).
        """
        assert self._config is not None
        tokenizer = None if self._llm is None else self._llm.tokenizer
        return translation.canary(tokenizer, self._config.model_config.hf_text_config, prompt_tokens=2)

    def progress(self) -> int:
        """Return the number of engine steps that were reported."""
        return 0 if self._processor is None else self._processor.steps

    async def check_health(self) -> None:
        """Raise EngineDeadError once vLLM says so."""
        if self._llm is not None and self._llm.errored:
            raise EngineDeadError("vLLM reports that its engine is dead")

    def condemn(self) -> None:
        """Take note that the engine is beyond repair: its processes are killed without being asked first."""
        self._condemned = True

    async def drain(self, deadline: Deadline) -> None:
        """Wait until other workers have fetched the KV blocks that this one holds for them."""
        llm = self._llm
        if llm is None or self._role is None or self._role.mode != "prefill":
            return
        # vLLM keeps a request that has handed its blocks over in its scheduler until they are fetched.
        while not deadline.passed and self._load.held_blocks():
            await asyncio.sleep(0.1)

    # ------------------------------------------------------------------------------------- routers and operators

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:  # noqa: ARG002 - part of the protocol
        """Publish load and KV events if somebody may read them."""
        assert self._llm is not None
        if not self._context.events_wanted:
            return
        if not self._args.disable_log_stats:
            await self._load.attach(endpoint, self.ranks)
        config = self._llm.vllm_config
        sources = kv_event_sources(self._llm, self.ranks)
        if sources:
            topic = config.kv_events_config.topic
            self._publishers = publish_kv_events(endpoint, config.cache_config.block_size, sources, topic)

    def metrics_registry(self) -> CollectorRegistry:
        """Return vLLM's own metrics."""
        return metrics_registry()

    # --------------------------------------------------------------------------------------------------- the end

    async def shutdown(self, deadline: Deadline) -> None:
        """End vLLM's processes: ask them, wait, kill what is left."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        llm, self._llm = self._llm, None
        tree = EngineProcesses(TITLE)
        if llm is None or self._condemned:
            # A start that was interrupted, or an engine beyond repair: there is nothing to shut down in order.
            tree.signal_leaders()
            await tree.end(0.1, deadline)
        if llm is None:
            return
        # Nobody waits for output any more, and its reader would log the end of vLLM's processes as an error.
        if llm.output_handler is not None:
            llm.output_handler.cancel()
        # vLLM asks its processes to end and waits for them; we see to it that this does not take long.
        shutdown = asyncio.ensure_future(asyncio.to_thread(llm.shutdown, deadline.remaining()))
        await tree.end(_TERMINATE_SECONDS, deadline)
        await asyncio.wait({shutdown}, timeout=deadline.remaining())
        if shutdown.done() and shutdown.exception() is not None:
            log.warning("vLLM's own shutdown failed", exc_info=shutdown.exception())


def _finished(chunk: Chunk) -> Chunk:
    """Name the reason of a last chunk as Dynamo does.

    :raises Disconnected: vLLM could not finish the request for a reason of its own: another worker can.
    """
    reason = chunk.get("finish_reason")
    if reason is not None:
        name = FINISH_REASONS.get(str(reason))
        if name is None:
            # Not EngineShutdown: that takes the whole worker out of the frontends' rotation for 5 s (measured).
            raise Disconnected(f"vLLM ended the request: {reason}")
        chunk["finish_reason"] = name
        if chunk.get("stop_reason") is None:
            chunk.pop("stop_reason", None)
    return chunk


def _translated(error: BaseException) -> BaseException:
    """Return what an error of vLLM means to the worker and to the client."""
    if isinstance(error, VllmDeadError):
        return EngineDeadError("vLLM's engine is dead")
    if isinstance(error, exceptions.GracefulHTTPError):
        return WorkerUnavailable(f"vLLM takes no more requests: {error}")
    if isinstance(error, exceptions.VLLMClientError):
        return InvalidRequestError(str(error))
    return error
