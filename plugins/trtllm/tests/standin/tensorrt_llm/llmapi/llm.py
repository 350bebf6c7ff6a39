"""The `LLM` class: a blocking constructor, `generate_async` and a shutdown that waits for a live engine."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.executor import GenerationExecutor
from tensorrt_llm.executor.request import DEFAULT_REQUEST_PRIORITY, GenerationRequest, LoRARequest
from tensorrt_llm.executor.result import DetokenizedGenerationResultBase, GenerationResult, IterationResult
from tensorrt_llm.executor.utils import RequestError, create_mpi_comm_session, get_spawn_proxy_process_env
from tensorrt_llm.llmapi.exception_handler import exception_handler
from tensorrt_llm.llmapi.llm_args import TORCH_LLMARGS_REMOVED_ARGS, TorchLlmArgs, visible_gpus
from tensorrt_llm.llmapi.mpi_session import MpiPoolSession
from tensorrt_llm.llmapi.tokenizer import tokenizer_factory
from tensorrt_llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tensorrt_llm.conversation_params import ConversationParams
    from tensorrt_llm.scheduling_params import SchedulingParams
    from typing_extensions import Self

__all__ = ["LLM", "BaseLLM", "MultimodalEncoder", "PreprocessedInputs", "RequestOutput", "SamplingParams"]

_STATS_TIMEOUT_S = 2.0


@dataclass
class PreprocessedInputs:
    """Token ids that `generate_async` takes as they are."""

    prompt_token_ids: list[int]
    query_token_ids: list[int] | None = None
    multimodal_params: Any = None
    encoder_input_token_ids: list[int] | None = None


class RequestOutput(DetokenizedGenerationResultBase, GenerationResult):
    """A request in progress: one object, updated in place with each step."""

    def __init__(self) -> None:
        raise RuntimeError("a RequestOutput comes from generate_async")

    @classmethod
    def _from_generation_result(
        cls, generation_result: GenerationResult, prompt: str | None = None, tokenizer: Any = None
    ) -> RequestOutput:
        output = cls.__new__(cls)
        output.__dict__.update(generation_result.__dict__)
        output.tokenizer = tokenizer
        output._prompt = prompt
        return output

    @property
    def prompt(self) -> str | None:
        """The text of the prompt, where it was one."""
        return self._prompt


class BaseLLM:
    """What `LLM` and `MultimodalEncoder` share."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the ranks and wait until they are ready.

        Raises ValueError for an unknown or bad argument, RuntimeError for too few GPUs or ranks that fail.
        """
        self._executor: Any = None
        self.mpi_session: Any = None
        for name in kwargs:
            known = name == "_mpi_session" or name in TORCH_LLMARGS_REMOVED_ARGS
            if not (known or (name != "mpi_session" and name in TorchLlmArgs.model_fields)):
                raise ValueError(f"{type(self).__name__} got invalid argument: {name}")
        self.args = TorchLlmArgs(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        self.mpi_session = self.args.mpi_session
        self._owns_mpi_session = self.mpi_session is None
        self._tokenizer = None
        if not self.args.skip_tokenizer_init:
            try:
                self._tokenizer = tokenizer_factory(self.args.tokenizer or str(self.args.model))
            except OSError:
                self._tokenizer = None
        self._check_gpus()
        world_size = self.args.world_size
        try:
            if world_size > 1 and self.mpi_session is None:
                self.mpi_session = (
                    create_mpi_comm_session(world_size)
                    if get_spawn_proxy_process_env()
                    else MpiPoolSession(n_workers=world_size)
                )
            self._executor = GenerationExecutor.create(
                self.args, model_world_size=world_size, mpi_session=self.mpi_session
            )
        except BaseException:
            if self._owns_mpi_session and self.mpi_session is not None:
                self.mpi_session.shutdown()
            raise
        exception_handler.register(self, "shutdown")
        atexit.register(_shutdown_if_alive, weakref.ref(self))

    def _check_gpus(self) -> None:
        wanted = min(self.args.world_size, self.args.gpus_per_node or self.args.world_size)
        if visible_gpus() < wanted:
            raise RuntimeError(f"Only {visible_gpus()} GPUs are available, but {wanted} are required.")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None with `skip_tokenizer_init` or where the model has none."""
        return self._tokenizer

    def _running_executor(self) -> Any:
        if self._executor is None or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        return self._executor

    def generate(
        self, inputs: Any, sampling_params: Any = None, use_tqdm: bool = True, **kwargs: Any
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one prompt or several, and wait for the answers."""
        single = not isinstance(inputs, list) or (bool(inputs) and isinstance(inputs[0], int))
        outputs = [
            self.generate_async(
                prompt, sampling_params[at] if isinstance(sampling_params, list) else sampling_params, **kwargs
            )
            for at, prompt in enumerate([inputs] if single else inputs)
        ]
        for output in outputs:
            output.result()
        return outputs[0] if single else outputs

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: Mapping[str, str] | None = None,
        _postproc_params: Any = None,
        scheduling_params: SchedulingParams | None = None,
        conversation_params: ConversationParams | None = None,
        cache_salt: str | None = None,
        priority: float = DEFAULT_REQUEST_PRIORITY,
    ) -> RequestOutput:
        """Submit a request and return at once; the running event loop, if any, is where it can be iterated.

        Changes `sampling_params`. Raises RuntimeError while shutting down, ValueError, TypeError and RequestError for
        a bad request, EngineDeadError once the engine is known to be dead.
        """
        executor = self._running_executor()
        if not 0 <= priority <= 1:
            raise ValueError(f"priority must be between 0.0 and 1.0, got {priority}")
        params = self._prepare_sampling_params(sampling_params)
        prepared = self.preprocess(inputs, params, disaggregated_params)
        prompt = inputs if isinstance(inputs, str) else inputs.get("prompt") if isinstance(inputs, Mapping) else None
        self._check_arguments(prepared, params)
        if disaggregated_params is not None and disaggregated_params.request_type == "context_only":
            params.max_tokens = 1
        result = executor.submit(
            GenerationRequest(
                prepared.prompt_token_ids,
                params,
                postproc_params=_postproc_params,
                query_token_ids=prepared.query_token_ids,
                lora_request=lora_request,
                prompt_adapter_request=prompt_adapter_request,
                streaming=streaming,
                kv_cache_retention_config=kv_cache_retention_config,
                disaggregated_params=disaggregated_params,
                trace_headers=dict(trace_headers) if trace_headers is not None else None,
                multimodal_params=prepared.multimodal_params,
                scheduling_params=scheduling_params,
                conversation_params=conversation_params,
                cache_salt=cache_salt,
                priority=priority,
            )
        )
        return RequestOutput._from_generation_result(result, prompt, self.tokenizer)

    def preprocess(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        disaggregated_params: DisaggregatedParams | None = None,
    ) -> PreprocessedInputs:
        """Return the token ids of a text, of token ids, or of a dict of either; raises TypeError for others."""
        if isinstance(inputs, PreprocessedInputs):
            return inputs
        query = None
        if isinstance(inputs, Mapping):
            if inputs.get("multi_modal_data") is not None or inputs.get("multi_modal_embeddings") is not None:
                raise NotImplementedError("the stand-in takes text and token ids only")
            query = inputs.get("query_token_ids")
            inputs = inputs["prompt_token_ids"] if "prompt_token_ids" in inputs else inputs.get("prompt")
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer; pass token ids")
            tokens = self.tokenizer.encode(
                inputs, add_special_tokens=sampling_params is None or sampling_params.add_special_tokens
            )
            if sampling_params is not None and sampling_params.truncate_prompt_tokens is not None:
                tokens = tokens[-sampling_params.truncate_prompt_tokens :]
            return PreprocessedInputs(tokens)
        if isinstance(inputs, Sequence):
            return PreprocessedInputs(list(inputs), query)
        raise TypeError(f"inputs: expected text, token ids or a dict of them, got {type(inputs).__name__}")

    def _prepare_sampling_params(self, given: SamplingParams | None) -> SamplingParams:
        params = SamplingParams() if given is None else given
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params: expected SamplingParams, got {type(params).__name__}")
        if params.end_id is None:
            if self.tokenizer is None:
                raise ValueError("sampling_params.end_id must be set where there is no tokenizer")
            params._setup(self.tokenizer)
        elif self.tokenizer is not None:
            params._setup(self.tokenizer)
        params._stream_interval = self.args.stream_interval
        params.return_perf_metrics = params.return_perf_metrics or self.args.return_perf_metrics
        return params

    def _check_arguments(self, prepared: PreprocessedInputs, params: SamplingParams) -> None:
        length = len(prepared.prompt_token_ids) + len(prepared.query_token_ids or [])
        if length == 0:
            raise IndexError("the prompt has no token")
        limit = self.args.max_num_tokens
        if not self.args.enable_chunked_prefill and limit is not None and length > limit:
            raise RequestError(
                f"The prompt has {length} tokens, but max_num_tokens is {limit} and chunked prefill is off"
            )
        if params.use_beam_search and (params.best_of or 1) > (self.args.max_beam_width or 1):
            raise RequestError(f"beam width {params.best_of} exceeds max_beam_width {self.args.max_beam_width}")

    def get_stats_async(self, timeout: float | None = _STATS_TIMEOUT_S) -> IterationResult:
        """Return the statistics since the last call, to be iterated; blocks for up to `timeout` seconds."""
        return self._executor.aget_stats(timeout=timeout)

    def get_stats(self, timeout: float | None = _STATS_TIMEOUT_S) -> list[dict[str, Any]]:
        """Return the statistics since the last call."""
        return self._executor.get_stats(timeout=timeout)

    def get_kv_cache_events_async(self, timeout: float | None = _STATS_TIMEOUT_S) -> IterationResult:
        """Return the KV events since the last call, to be iterated; blocks for up to `timeout` seconds."""
        return self._executor.aget_kv_events(timeout=timeout)

    def get_kv_cache_events(self, timeout: float | None = _STATS_TIMEOUT_S) -> list[dict[str, Any]]:
        """Return the KV events since the last call."""
        return self._executor.get_kv_events(timeout=timeout)

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """Return maxNumBlocks, tokensPerBlock and maxNumTokens."""
        return self._running_executor().get_kv_cache_capacity()

    def _check_health(self) -> bool:
        """Say whether the engine lives; False without one. Records a fatal error that it finds."""
        return self._executor is not None and self._executor.check_health()

    def shutdown(self) -> None:
        """End the engine: waits without bound for a live one, for seconds for a dead one. Can be repeated."""
        executor, self._executor = getattr(self, "_executor", None), None
        if executor is not None:
            executor.shutdown()
        session, self.mpi_session = getattr(self, "mpi_session", None), None
        if session is not None and self._owns_mpi_session:
            session.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        self.shutdown()

    def __getstate__(self) -> None:
        raise RuntimeError("an LLM cannot be pickled")


class LLM(BaseLLM):
    """A model on the PyTorch backend."""

    def _collective_rpc(
        self,
        method: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        target_ranks: int | list[int] | None = None,
    ) -> list[Any]:
        """Call a method of the engine on every rank; return their results."""
        return self._running_executor().collective_rpc(method, args, kwargs, non_block, unique_reply_rank, target_ranks)


class MultimodalEncoder(BaseLLM):
    """A vision encoder, by name only."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._executor = None
        self.mpi_session = None
        raise NotImplementedError("the stand-in has no multimodal encoder")


def _shutdown_if_alive(reference: weakref.ref[BaseLLM]) -> None:
    llm = reference()
    if llm is not None:
        llm.shutdown()
