"""The engine: starts TensorRT-LLM, hands requests over, sends the outputs, and ends TensorRT-LLM's processes.

Every call that sends to a rank is made off the event loop: such a call blocks for ever if the rank has just died.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import tensorrt_llm
from dynamo.llm.exceptions import Disconnected
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.metrics import MetricsCollector

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError
from dynamo_worker.kit import engine_arguments, forward_pass_metrics, huggingface, mpi_job, push_engine
from dynamo_worker.kit.blocking import OneAtATime, in_thread
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.kit.chunks import token_decoder
from dynamo_worker.kit.engine_lifecycle import shut_down
from dynamo_worker.kit.in_flight import RequestsInFlight
from dynamo_worker.kit.push_engine import Job, PushEngine
from dynamo_worker.logs import get_logger
from dynamo_worker_trtllm import arguments, nodes, outputs
from dynamo_worker_trtllm.control import Control, lora_request
from dynamo_worker_trtllm.disaggregation import Role
from dynamo_worker_trtllm.forward_passes import ForwardPasses
from dynamo_worker_trtllm.load import kv_events, read_load
from dynamo_worker_trtllm.outputs import Answers
from dynamo_worker_trtllm.sampling import SamplingTable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from dynamo.runtime import Endpoint

    from dynamo_worker import Deadline, EngineContext, Request
    from dynamo_worker.kit.huggingface import ModelFiles
    from dynamo_worker.kit.kv_events import KvEventSource
    from dynamo_worker.kit.publishing import LoadPoller

log = get_logger(__name__)

#: Seconds that TensorRT-LLM's own shutdown gets. It waits for the ranks without a bound, and releases nothing that the
#: kernel does not release once they are killed.
_SHUTDOWN_SECONDS: Final = 1.0
#: Seconds to wait for the end of a call for statistics.
_STATISTICS_SECONDS: Final = 1.0
#: Seconds until the kernel has removed ranks that were killed.
_KILLED_SECONDS: Final = 0.5
#: Every ``LLM`` of this process, which ends without destroying them: their destructors wait for the ranks.
_KEPT: Final[list[Any]] = []


@dataclass
class Started(push_engine.Started):
    """The parts of a started TensorRT-LLM.

    :ivar decode: returns the text of a token.
    """

    role: Role
    llm: Any
    model: ModelFiles
    load: LoadPoller[Any]
    decode: Callable[[int], str | None]

    @property
    def ranks(self) -> range:
        """The data-parallel ranks: with attention data parallelism, each tensor-parallel rank has its own KV cache."""
        args = self.llm.args
        return range(args.tensor_parallel_size if args.enable_attention_dp else 1)


class TrtllmEngine(PushEngine[Started]):
    """TensorRT-LLM as dynamo-worker drives it."""

    NAME: ClassVar = "TensorRT-LLM"
    METRICS: ClassVar = ("trtllm_",)

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args, context)
        self._steps = 0
        self._requests: RequestsInFlight[Any] = RequestsInFlight(
            "trtllm-sender",
            lambda result: result.abort(),
            may_abort=lambda: self._started is not None and not self._failed,
            run_beside=self.run_beside,
            # An abort while the KV cache is on its way would take the prefill worker's blocks with it.
            fetches=lambda: self._started is not None and self._started.role.mode == "decode",
        )
        self.at_stop.append(self._requests.close)
        # Its check shuts the executor down if it fails.
        self._health = OneAtATime(lambda: in_thread(self.started.llm._check_health, name="trtllm-health"))  # noqa: SLF001
        self._metrics: MetricsCollector | None = None
        self._forward_passes = ForwardPasses()

    async def launch(self) -> Started:
        """Start TensorRT-LLM's ranks and wait until the model is loaded."""
        settings = await asyncio.to_thread(arguments.configure, self.args)
        role = Role(self.args.disaggregation_mode, settings)
        nodes.lead()
        log.info("Starting TensorRT-LLM", version=tensorrt_llm.__version__, model=settings["model"])
        llm = await self.construct(lambda: _build(settings), lambda: mpi_job.launched().children)
        args, tokenizer = llm.args, getattr(llm.tokenizer, "tokenizer", llm.tokenizer)
        if self.args.publish_metrics:
            self._metrics = MetricsCollector({"model_name": self._served_names(args.model)[0], "engine_type": "trtllm"})
        model = await asyncio.to_thread(
            huggingface.read, str(args.model), tokenizer, args.max_seq_len, trust_remote_code=args.trust_remote_code
        )
        reader = read_load(llm, self.load, self._metrics, self._forward_passes)
        self.at_stop.append(reader.stop)
        return Started(
            SamplingTable(model, args),
            role,
            Control(llm, self.context, (model.path, self._served_names(model.path)[0]), self._requests.idle),
            llm,
            model,
            reader,
            token_decoder(tokenizer),
        )

    def _served_names(self, path: Any) -> list[str]:
        """Return the names that clients use for the model, the main one first."""
        return engine_arguments.served_names(self.args.served_model_name) or [str(path)]

    def describe(self, started: Started) -> EngineInfo:
        """Return the model's properties and the size of the KV cache that TensorRT-LLM has allocated."""
        args, model = started.llm.args, started.model
        name, *aliases = self._served_names(model.path)
        return EngineInfo(
            model_name=name,
            model_aliases=aliases,
            model_path=model.path,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            kv_block_size=int(args.kv_cache_config.tokens_per_block),
            total_kv_blocks=_total_blocks(started.llm),
            max_num_seqs=args.max_batch_size,
            max_num_batched_tokens=args.max_num_tokens,
            data_parallel_size=len(started.ranks),
            max_loras=(getattr(args.lora_config, "max_loras", None) or 1) if args.enable_lora else None,
        )

    # ------------------------------------------------------------------------------------------------------ requests

    async def answer(self, started: Started, job: Job) -> None:
        """Hand a request to TensorRT-LLM, and wait until its client has the last chunk."""
        answers = Answers(
            job.send,
            prompt_tokens=len(job.request["token_ids"]),
            top=job.params.top,
            prompt_top=job.params.prompt_top,
            decode=started.decode,
            hand_over=started.role.hand_over(job.params),
            on_step=self._step,
        )
        try:
            await self._requests.answer(job.context.id(), answers, lambda: self._submit(started.llm, job))
        except Disconnected:
            await self.stays_well()
            raise

    @staticmethod
    def _submit(llm: Any, job: Job) -> Any:
        try:
            return llm.generate_async(
                job.request["token_ids"],
                job.params.params,
                lora_request=None if job.lora is None else lora_request(job.lora),
                streaming=True,
                trace_headers=job.context.trace_headers(),
                **job.params.options,
            )
        except (ValueError, TypeError, NotImplementedError, LookupError, AssertionError, RequestError) as error:
            raise InvalidRequestError(str(error) or type(error).__name__) from error
        except Exception as error:
            raise outputs.translated(error) from error

    def _step(self, result: Any) -> None:
        self._steps += 1
        if result.finished and self._metrics is not None:
            try:
                self._metrics.log_request_metrics_dict(result.metrics_dict)
            except Exception as error:  # the client still gets its answer
                log.warning("TensorRT-LLM's metrics failed", error=error)

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request, and wait until the engine has acknowledged that."""
        await self._requests.abort(request_id)

    # -------------------------------------------------------------------------------------------------------- health

    def processes(self) -> Iterable[int]:
        """Return the pids of Open MPI's daemon and of all ranks on this node."""
        return mpi_job.processes() if _KEPT else []

    def canary_request(self) -> Request:
        """Return a request for one token, which needs no other worker."""
        request = canary_request(self.started.model.tokenizer, self.started.model.config)
        # With attention data parallelism the ranks make requests of their own, and fail if one has the same prefix.
        request["routing"] = {"cache_salt": "dynamo-worker-canary"}
        return request

    def progress(self) -> int:
        """Return the number of steps that the engine has reported, for requests and in its statistics."""
        return self._steps + (0 if self._started is None else self._started.load.steps)

    async def check_health(self) -> None:
        """Ask TensorRT-LLM whether it is well.

        :raises EngineDeadError: it is not.
        """
        started = self._started
        if started is not None and not await self._health.answer():
            error = getattr(started.llm._executor, "_fatal_error", None)  # noqa: SLF001
            raise EngineDeadError(f"TensorRT-LLM reports that it has failed: {error or 'no reason given'}")

    def pending_transfers(self, started: Started) -> int:
        """Return the number of requests that the ranks hold, among them those whose KV cache is not fetched yet."""
        return started.load.requests()

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Publish load and KV events if a router may read them, and forward-pass metrics if the operator asks."""
        await super().attach(endpoint, info)
        if forward_pass_metrics.wanted(self.args):
            self._forward_passes.attach(endpoint, self.worker_id, len(self.started.ranks))
            self.at_stop.append(self._forward_passes.stop)

    def kv_events(self, started: Started) -> KvEventSource | None:
        """Return how TensorRT-LLM hands out its KV events."""
        return kv_events(started.llm, started.ranks)

    # ------------------------------------------------------------------------------------------------------- the end

    async def shutdown(self, deadline: Deadline) -> None:
        """End the ranks: let TensorRT-LLM try, unless the engine is broken, then kill them."""
        started = self.stop()
        if started is not None and not self._failed:
            # A call for statistics that is under way when TensorRT-LLM closes its connections never returns.
            await started.load.stopped(min(_STATISTICS_SECONDS, deadline.remaining()))
            await shut_down(self.NAME, started.llm.shutdown, min(_SHUTDOWN_SECONDS, deadline.remaining()))
        await mpi_job.end(deadline.within(_KILLED_SECONDS))


def _build(settings: Mapping[str, Any]) -> Any:
    llm = tensorrt_llm.LLM(**settings)
    _KEPT.append(llm)
    return llm


def _total_blocks(llm: Any) -> int | None:
    with contextlib.suppress(Exception):  # not every version and executor has it
        return int(llm.get_kv_cache_capacity()["maxNumBlocks"])
    return None
