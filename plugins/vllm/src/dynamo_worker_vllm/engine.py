"""The engine: starts vLLM, hands requests over, streams the outputs, and ends vLLM's processes."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from vllm import envs, exceptions
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError, StartError
from dynamo_worker.engine import LocalContext
from dynamo_worker.kit import (
    child_metrics,
    engine_processes,
    forward_pass_metrics,
    media_settings,
    push_engine,
    request_metadata,
)
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.kit.child_metrics import ChildCollector
from dynamo_worker.kit.chunks import token_decoder
from dynamo_worker.kit.deferred_aborts import DeferredAborts
from dynamo_worker.kit.engine_processes import EngineProcesses
from dynamo_worker.kit.image_requests import ImageRequests
from dynamo_worker.kit.push_engine import Job, PushEngine
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import arguments, images, load, outputs, sampling
from dynamo_worker_vllm.control import Control, lora_request
from dynamo_worker_vllm.disaggregation import Role
from dynamo_worker_vllm.outputs import FINISH_REASONS, OutputReader
from dynamo_worker_vllm.processes import TITLE
from dynamo_worker_vllm.runtime_data import runtime_data

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client import CollectorRegistry
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from dynamo_worker import Deadline, EngineContext, Request
    from dynamo_worker.engine import Chunk
    from dynamo_worker.kit.media_requests import MediaReference
    from dynamo_worker.kit.publishing import KvEvents
    from dynamo_worker_vllm.outputs import DeltaProcessor

log = get_logger(__name__)

#: Seconds between two of vLLM's log lines about its load.
_LOG_STATS_SECONDS = 10.0
#: Seconds that vLLM's processes get to end by themselves. Nothing is in flight any more. They release their resources
#: within milliseconds, but their interpreters need another 3 s to exit (measured).
_TERMINATE_SECONDS = 1.0
#: Number of requests whose constraints are compiled in parallel.
_GUIDE_THREADS = 2
#: How the names of metrics begin that other packages have in vLLM's processes.
_OF_PLUGINS = ("lmcache:",)
#: Options of requests that make vLLM compile its sampler; on a CPU the first client would otherwise wait 13 s for that
#: (measured).
_WARM_UP: tuple[dict[str, Any], ...] = (
    {"sampling_options": {"temperature": 1.0, "top_p": 0.9, "top_k": 10}, "output_options": {"logprobs": 1}},
    {"sampling_options": {"temperature": 1.0}},
)


@dataclass
class Started(push_engine.Started):
    """The parts of a started vLLM.

    :ivar processor: the fast path for plain requests; None if this version of vLLM has none.
    :ivar block_size: tokens in one block of the KV cache, as KV events state it.
    :ivar decode: returns the text of a token.
    :ivar preparation: puts images into prompts.
    """

    role: Role
    control: Control
    llm: AsyncLLM
    block_size: int
    processor: DeltaProcessor | None
    decode: Callable[[int], str | None]
    preparation: images.Preparation

    @property
    def config(self) -> VllmConfig:
        """The configuration that vLLM has completed."""
        return self.llm.vllm_config

    @property
    def ranks(self) -> list[int]:
        """The data-parallel ranks served here."""
        return list(self.llm.engine_core.engine_ranks_managed)


class VllmEngine(PushEngine[Started]):
    """vLLM as dynamo-worker drives it."""

    NAME: ClassVar = "vLLM"
    METRICS: ClassVar = ("vllm:",)
    ROLE: ClassVar = Role

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args, context)
        #: Compiles the constraints of requests to find out whether they are valid.
        self._guides = ThreadPoolExecutor(_GUIDE_THREADS, thread_name_prefix="guides")
        self._deferred = DeferredAborts(self.run_beside)
        #: Where vLLM's processes write the metrics of what plugs into them, such as LMCache.
        self._metrics_directory = ""
        self._images = ImageRequests(media_settings.from_arguments(args), enabled=args.enable_multimodal)

    async def launch(self) -> Started:
        """Start vLLM's processes and wait until the model is loaded.

        The work runs in threads: meanwhile `/live` answers and signals are handled.
        """
        # Sockets between vLLM's processes; the default directory outlives a worker without a supervisor.
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(self.context.private_dir))
        self._metrics_directory = await asyncio.to_thread(child_metrics.share, self.context.private_dir)
        config = await asyncio.to_thread(arguments.configure, self.args, self.context.private_dir)
        self.prepare(config)
        role = self.ROLE(self.args.disaggregation_mode, config)
        model = config.model_config
        table = sampling.SamplingTable(model.get_diff_sampling_param(), model.max_model_len)
        llm = await self.construct(lambda: self._build(config))
        control = Control(llm, self.context, (model.model, *self._served_names(config)), trainers=self.args.enable_rl)
        if llm.logger_manager is not None:
            self.run_beside(self._log_stats(llm))
        block_size = await load.block_size(llm)
        await self._images.start(self._served_names(config)[0], images.most_per_request(llm))
        processor, preparation = outputs.install(llm), images.Preparation(llm)
        return Started(table, role, control, llm, block_size, processor, token_decoder(llm.tokenizer), preparation)

    def prepare(self, config: VllmConfig) -> None:
        """Check and complete the configuration.

        :raises StartError: the model does not generate.
        """
        if config.model_config.runner_type != "generate":
            raise StartError(
                f"{config.model_config.model} is a pooling model, which generates nothing",
                hint="--embedding-worker serves its embeddings",
            )
        if forward_pass_metrics.wanted(self.args):
            load.measure_forward_passes(config, self.worker_id, self.context.private_dir)

    def _build(self, config: VllmConfig) -> AsyncLLM:
        return AsyncLLM.from_vllm_config(
            config,
            enable_log_requests=self.args.enable_log_requests,
            disable_log_stats=self.args.disable_log_stats,
            aggregate_engine_logging=self.args.aggregate_engine_logging,
            stat_loggers=[load.stat_logger(self.load)] if self.reports_load() else None,
        )

    @staticmethod
    async def _log_stats(llm: AsyncLLM) -> None:
        while True:
            await asyncio.sleep(_LOG_STATS_SECONDS)
            await llm.do_log_stats()

    async def warm_up(self) -> None:
        """Compile the sampler; the worker's own warm-up request is greedy."""
        for number, options in enumerate(_WARM_UP):
            stop = {"max_tokens": 2, "ignore_eos": True}
            request: Any = {**self.canary_request(), **options, "stop_conditions": stop}
            async for _ in self.generate(request, LocalContext(f"warm-up-{number}")):
                pass
        # vLLM looks up its environment variables for every token; from now on they do not change.
        envs.enable_envs_cache()

    def _served_names(self, config: VllmConfig) -> list[str]:
        """Return the names that clients use for the model, the main one first."""
        served = self.args.served_model_name or config.model_config.served_model_name
        return [served] if isinstance(served, str) else list(served)

    def describe(self, started: Started) -> EngineInfo:
        """Return the model's properties and the size of the KV cache that vLLM has allocated."""
        config, ranks = started.config, started.ranks
        name, *aliases = self._served_names(config)
        blocks = config.cache_config.num_gpu_blocks
        return EngineInfo(
            model_name=name,
            model_path=config.model_config.model,
            model_aliases=aliases,
            context_length=config.model_config.max_model_len,
            vocab_size=vocab_size(config, started.llm.tokenizer),
            kv_block_size=started.block_size,
            total_kv_blocks=blocks // len(ranks) if blocks else None,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            data_parallel_start_rank=ranks[0],
            data_parallel_size=len(ranks),
            max_loras=None if config.lora_config is None else config.lora_config.max_loras,
            runtime_config={"enable_local_indexer": True},
            runtime_data=runtime_data(config, self.args.stream_interval),
        )

    async def answer(self, started: Started, job: Job) -> None:
        """Hand a request to vLLM, and send its outputs until it is complete."""
        started.control.weights.check_usable()
        references = self._images.references(job.request)
        if not references:
            return await self._answer(started, job, tokens_input(job.request["token_ids"], cache_salt=_salt(job)))
        begun = False

        def send(chunk: Chunk) -> None:
            nonlocal begun
            begun = True
            job.send(chunk)

        attempt = job._replace(send=send)
        try:
            return await self._answer_with_images(started, attempt, references)
        except Disconnected:
            if begun:
                raise
        # vLLM's processes may disagree about which images both have: one was prepared, but its request never came. vLLM
        # has forgotten those now.
        return await self._answer_with_images(started, attempt, references)

    async def _answer_with_images(self, started: Started, job: Job, references: Sequence[MediaReference]) -> None:
        async with self._images.load(job.request, references) as loaded:
            prompt = await started.preparation.prompt(job.request, loaded, _salt(job))
        await self._answer(started, job, prompt)

    async def _answer(self, started: Started, job: Job, prompt: Any) -> None:
        """Hand a request to vLLM, and send what arrives in its mailbox until it is complete."""
        mailbox = await self._submit(started.llm, job, prompt)
        role, send = started.role, job.send
        params: SamplingParams = job.params
        disconnect = None if started.processor is None else started.processor.connect(mailbox, send)
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
                    raise translated(output)
                if type(output) is dict:
                    role.hand_over(output, params)
                    send(_finished(output))
                    if "finish_reason" in output:
                        return
                    continue
                if reader is None:
                    reader = OutputReader(len(prompt["prompt_token_ids"]), params.num_logprobs, started.decode)
                for chunk in reader.read(output):
                    role.hand_over(chunk, params)
                    send(_finished(chunk))
                if output.finished:
                    return
        finally:
            if disconnect is not None:
                disconnect()

    async def _submit(self, llm: AsyncLLM, job: Job, prompt: Any) -> Any:
        """Give a request to vLLM and return the mailbox of its outputs."""
        request, params = job.request, job.params
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
                job.context.id(),
                prompt,
                params,
                lora_request=None if job.lora is None else lora_request(job.lora),
                trace_headers=job.context.trace_headers(),
                priority=-(request_metadata.priority(request) or 0),  # vLLM: the lowest number goes first
                session_id=request_metadata.session_id(request),
                data_parallel_rank=_local_rank(request, llm.engine_core.engine_ranks_managed),
                kv_hints=sampling.kv_hints(request),
                **sampling.reasoning(request),
            )
        except ValueError as error:  # vLLM rejects a request with this, or with its own errors
            raise InvalidRequestError(str(error)) from error
        except Exception as error:
            raise translated(error) from error

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request; if its KV cache is on its way, later."""
        started = self._started
        begun = outputs.not_begun(started.llm, request_id) if started is not None and started.role.fetches else None
        if begun is None:
            await self._abort(request_id)
        else:
            await self._deferred.abort(request_id, begun, lambda: self._abort(request_id))

    async def _abort(self, request_id: str) -> None:
        if self._started is not None and not self._started.llm.errored:
            await self._started.llm.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the pids of all of vLLM's processes."""
        if self._started is None:
            return []
        # The EngineCores are children of this process, even if they could not set their title.
        cores = (child.pid for child in multiprocessing.active_children() if child.pid is not None)
        return {*cores, *engine_processes.named(TITLE)}

    def canary_request(self) -> Request:
        """Return a request for one token.

        Its prompt has two: vLLM's ExampleConnector miscounts the blocks of a prompt of one (0.31).
        """
        llm = self.started.llm
        return canary_request(llm.tokenizer, llm.vllm_config.model_config.hf_text_config, prompt_tokens=2)

    def progress(self) -> int:
        """Return the number of engine steps that were reported."""
        return 0 if self._started is None or self._started.processor is None else self._started.processor.steps

    async def check_health(self) -> None:
        """Raise EngineDeadError once vLLM reports that its engine is dead."""
        if self._started is not None and self._started.llm.errored:
            raise EngineDeadError("vLLM reports that its engine is dead")
        if self._started is not None:
            self._started.control.weights.check_alive()

    def pending_transfers(self, started: Started) -> int:  # noqa: ARG002 - part of the protocol
        """Return the blocks in use: vLLM keeps those of a finished prefill in its scheduler until they are fetched."""
        return self.load.held_blocks()

    def reports_load(self) -> bool:
        """Return whether vLLM reports its statistics."""
        return not self.args.disable_log_stats

    def kv_events(self, started: Started) -> KvEvents | None:
        """Return where vLLM's ranks publish."""
        return load.kv_events(started.llm, started.ranks, started.block_size)

    def hit_rates(self) -> Mapping[int, float]:
        """Return which part of the prompts' tokens each rank's prefix cache had."""
        return load.hit_rates()

    def metrics_registry(self) -> CollectorRegistry:
        """Return vLLM's own metrics, and those of the KV caches that plug into it."""
        registry = super().metrics_registry()
        if self._metrics_directory:
            registry.register(ChildCollector(self._metrics_directory, *_OF_PLUGINS))
        return registry

    async def shutdown(self, deadline: Deadline) -> None:
        """End vLLM's processes: ask them, wait, kill what is left."""
        await self._images.close()
        started = self.stop()
        tree = EngineProcesses(TITLE)
        if started is None or self._failed:
            # The start was interrupted or the engine is broken: an orderly shutdown is impossible.
            tree.signal_leaders()
            await tree.end(0.1, deadline)
        if started is None:
            return
        llm = started.llm
        # Nothing waits for outputs any more, and their reader would log the end of the processes as an error.
        if llm.output_handler is not None:
            llm.output_handler.cancel()
        # vLLM asks its processes to end and waits for them; the tree bounds the wait.
        shutdown = asyncio.ensure_future(asyncio.to_thread(llm.shutdown, deadline.remaining()))
        await tree.end(_TERMINATE_SECONDS, deadline)
        await asyncio.wait({shutdown}, timeout=deadline.remaining())
        if not shutdown.done():
            return
        if shutdown.exception() is not None:
            log.warning("vLLM's own shutdown failed", exc_info=shutdown.exception())
            return
        # vLLM leaves ZMQ's own threads, which wait for sockets that are open, and pipes to processes that have ended.
        context = getattr(llm.engine_core, "ctx", None)
        if context is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                limit = deadline.within(_TERMINATE_SECONDS).remaining()
                await in_thread(context.term, name="zmq-term", limit=limit)
        multiprocessing.active_children()


def vocab_size(config: VllmConfig, tokenizer: Any) -> int:
    """Return the first token id that vLLM rejects: some models know more tokens than their tokenizer, some fewer."""
    size: int = config.model_config.get_vocab_size()
    return size if tokenizer is None else max(size, tokenizer.max_token_id + 1)


def _salt(job: Job) -> str | None:
    return request_metadata.cache_salt(job.request)


def _local_rank(request: Mapping[str, Any], ranks: Iterable[int]) -> int | None:
    """Return the data-parallel rank that the router chose, counted from the first one here."""
    rank, served = request_metadata.dp_rank(request), list(ranks)
    if rank is None or len(served) == 1:
        return None
    return served.index(rank) if rank in served else None


def _finished(chunk: Any) -> Any:
    """Give the finish reason of a last chunk Dynamo's name.

    :raises Disconnected: vLLM could not finish the request, but another worker can.
    """
    reason = chunk.get("finish_reason")
    if reason is not None:
        name = FINISH_REASONS.get(str(reason))
        if name is None:
            # Not EngineShutdown, which takes the whole worker out of the frontends' rotation for 5 s (measured).
            raise Disconnected(f"vLLM ended the request: {reason}")
        chunk["finish_reason"] = name
        if chunk.get("stop_reason") is None:
            chunk.pop("stop_reason", None)
    return chunk


def translated(error: BaseException) -> BaseException:
    """Return the error that tells the worker and the client what an error of vLLM means."""
    if isinstance(error, VllmDeadError):
        return EngineDeadError("vLLM's engine is dead")
    if isinstance(error, exceptions.GracefulHTTPError):
        return WorkerUnavailable(f"vLLM accepts no more requests: {error}")
    if isinstance(error, exceptions.VLLMClientError):
        return InvalidRequestError(str(error))
    return error
