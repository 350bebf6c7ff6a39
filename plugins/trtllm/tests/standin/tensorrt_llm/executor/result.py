"""What a caller holds of a request: one object, updated in place with every step."""

from __future__ import annotations

import asyncio
import json
import queue
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .queues import AsyncQueue, has_event_loop
from .utils import EngineDeadError, ErrorResponse

if TYPE_CHECKING:
    from tensorrt_llm._torch.pyexecutor.llm_response import LlmResponse, OutputDelta
    from tensorrt_llm.disaggregated_params import DisaggregatedParams
    from tensorrt_llm.sampling_params import SamplingParams

    from .executor import GenerationExecutor
    from .request import GenerationRequest

FINISH_REASONS = {
    "end_id": "stop",
    "stop_words": "stop",
    "length": "length",
    "timeout": "timeout",
    "cancelled": "cancelled",
    "not_finished": "not_finished",
}


@dataclass(slots=True)
class Logprob:
    """The log probability of a token and its rank in the vocabulary, 1 being the likeliest."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of the answer; `token_ids` is cumulative and extended in place."""

    index: int
    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] | None = field(default_factory=list)
    prompt_logprobs: list[Any] | None = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: dict[str, Any] | None = None
    additional_generation_outputs: dict[str, Any] | None = None
    disaggregated_params: DisaggregatedParams | None = None
    request_perf_metrics: Any = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)
    _last_logprobs_len: int = field(default=0, init=False, repr=False)
    _postprocess_result: Any = None

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]

    @property
    def logprobs_diff(self) -> list[Any]:
        return self.logprobs[self._last_logprobs_len :]


class GenerationResultBase:
    """Applies responses to the outputs."""

    def __init__(
        self,
        request_id: int,
        sampling_params: SamplingParams,
        background_error_handler: Callable[..., None] | None = None,
        postproc_params: Any = None,
    ) -> None:
        self.id = request_id
        self.sampling_params = sampling_params
        self.postproc_params = postproc_params
        self.disaggregated_params: DisaggregatedParams | None = None
        self.decoding_iter = 0
        self.cached_tokens = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[str, Any] = {}
        self._context_logits = None
        self._done = False
        self._terminal_error: EngineDeadError | None = None
        self.aqueue: AsyncQueue | None = AsyncQueue() if has_event_loop() else None
        self.queue: Any = queue.Queue() if self.aqueue is None else self.aqueue.sync_q
        self._outputs = [CompletionOutput(index) for index in range(sampling_params.best_of or 1)]
        self._background_error_handler = background_error_handler and weakref.WeakMethod(background_error_handler)

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The `n` best sequences."""
        params = self.sampling_params
        if params.use_beam_search or params.n == params.best_of:
            return self._outputs[: params.n]
        best = sorted(
            self._outputs,
            key=lambda output: float("-inf") if output.cumulative_logprob is None else output.cumulative_logprob,
            reverse=True,
        )
        for index, output in enumerate(best):
            output.index = index
        return best[: params.n]

    @property
    def context_logits(self) -> Any:
        return self._context_logits

    def _report(self, error: Exception | str | None = None) -> None:
        handler = self._background_error_handler and self._background_error_handler()
        if handler is not None:
            handler(error)

    def _apply(self, delta: OutputDelta) -> None:
        output = self._outputs[delta.index]
        output._last_token_ids_len = len(output.token_ids)
        output._last_logprobs_len = len(output.logprobs)
        output.token_ids.extend(delta.new_tokens)
        output.disaggregated_params = delta.disaggregated_params
        if delta.disaggregated_params is not None:
            self.disaggregated_params = delta.disaggregated_params
        if delta.logprobs is not None:
            output.logprobs.extend(delta.logprobs)
            output.cumulative_logprob = sum(
                entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=False)
            )
        if delta.prompt_logprobs is not None:
            output.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            if delta.finish_reason not in FINISH_REASONS:
                raise ValueError(f"Unknown finish reason: {delta.finish_reason}")
            output.finish_reason = FINISH_REASONS[delta.finish_reason]
            output.stop_reason = delta.stop_reason
        if delta.trim:
            # Shorter than before, and a new list: so the real one cuts off stop words.
            output.token_ids = output.token_ids[: -delta.trim]
            output.logprobs = output.logprobs[: len(output.token_ids)]

    def _handle_response(self, response: LlmResponse | ErrorResponse | EngineDeadError) -> None:
        if isinstance(response, EngineDeadError):
            self._done = True
            self._terminal_error = response
            raise response
        if isinstance(response, ErrorResponse):
            self._done = True
            self._report(response.error_msg)
            return
        if response.error is not None:
            self._done = True
            self._report(response.error)
            return
        self._done = response.final
        self.decoding_iter = response.decoding_iter
        self.cached_tokens = response.cached_tokens
        for delta in response.outputs:
            self._apply(delta)
        if self.decoding_iter:
            self.avg_decoded_tokens_per_iter = self._outputs[0].length / self.decoding_iter
        if self._done and self.sampling_params.return_perf_metrics:
            self.metrics_dict = {
                "finished_reason": self._outputs[0].finish_reason,
                "prompt_tokens": len(getattr(self, "prompt_token_ids", ())),
                "generation_tokens": sum(output.length for output in self._outputs),
            }
        self._report()


class DetokenizedGenerationResultBase(GenerationResultBase):
    """Adds text, unless the caller wants none."""

    def __init__(
        self,
        request_id: int,
        sampling_params: SamplingParams,
        tokenizer: Any = None,
        streaming: bool = False,
        background_error_handler: Callable[..., None] | None = None,
        postproc_params: Any = None,
    ) -> None:
        super().__init__(request_id, sampling_params, background_error_handler, postproc_params)
        self.tokenizer = tokenizer
        self._streaming = streaming

    def _handle_response(self, response: LlmResponse | ErrorResponse | EngineDeadError) -> None:
        super()._handle_response(response)
        params = self.sampling_params
        if not params.detokenize or self.tokenizer is None:
            return
        for output in self.outputs:
            output._last_text_len = len(output.text)
            output.text = self.tokenizer.decode(output.token_ids, skip_special_tokens=params.skip_special_tokens)


class GenerationResult(GenerationResultBase):
    """The future of one request: `result()`, `await`, iteration and async iteration."""

    def __init__(
        self,
        generation_request: GenerationRequest,
        background_error_handler: Callable[..., None] | None = None,
        executor: GenerationExecutor | None = None,
        disaggregated_params: DisaggregatedParams | None = None,
        logprob_params: Any = None,
    ) -> None:
        super().__init__(
            generation_request.id,
            generation_request.sampling_params,
            background_error_handler,
            postproc_params=generation_request.postproc_params,
        )
        self._generation_request = generation_request
        self._streaming = generation_request.streaming
        self._executor = executor and weakref.ref(executor)
        self._logprob_params = logprob_params
        self._aborted = False
        self.disaggregated_params = disaggregated_params

    @property
    def request_id(self) -> int:
        return self.id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._generation_request.prompt_token_ids

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        """Send rank 0 the wish to cancel; blocks while rank 0 is not there. The stream ends with `cancelled` later."""
        executor = self._executor and self._executor()
        assert executor is not None, "The executor is gone."
        self._aborted = True
        executor.abort_request(self.id)

    def aborted(self) -> bool:
        """Tell whether `abort` was called."""
        return self._aborted

    def _check_alive(self) -> None:
        if getattr(self, "_terminal_error", None) is not None:
            raise self._terminal_error

    def _result_step(self, timeout: float | None = None) -> None:
        self._handle_response(self.queue.get(timeout=timeout))

    async def _aresult_step(self) -> None:
        assert self.aqueue is not None, "The asyncio event loop was not present during initialization."
        self._handle_response(await self.aqueue.get())

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end of the answer; each step gets `timeout` seconds."""
        self._check_alive()
        while not self._done:
            self._result_step(timeout)
        return self

    async def aresult(self) -> GenerationResult:
        """Wait for the end of the answer."""
        self._check_alive()
        while not self._done:
            await self._aresult_step()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __iter__(self) -> GenerationResult:
        return self

    def __next__(self) -> GenerationResult:
        self._check_alive()
        if self._done:
            raise StopIteration
        self._result_step()
        return self

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        self._check_alive()
        if self._done:
            raise StopAsyncIteration
        await self._aresult_step()
        return self

    def _exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            self.result(timeout)
        except RuntimeError as error:
            return error
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id}, outputs={self.outputs}, finished={self._done})"

    def __hash__(self) -> int:
        return hash(self.id)


class IterationResult:
    """Statistics or KV events as they come, each a dict; its queue belongs to the loop that first asked."""

    def __init__(self) -> None:
        self._done = False
        self._timeout = 2.0
        self.aqueue: AsyncQueue | None = AsyncQueue() if has_event_loop() else None
        self.queue: Any = queue.Queue() if self.aqueue is None else self.aqueue.sync_q

    def set_timeout(self, timeout: float) -> None:
        """Wait that many seconds for the next item."""
        self._timeout = timeout

    def mark_undone(self) -> None:
        """Expect more after the end."""
        self._done = False

    def get_results(self) -> list[dict[str, Any]]:
        """Return all that is there."""
        results = []
        while not self.queue.empty():
            results.append(json.loads(self.queue.get()))
        return results

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._done:
            raise StopAsyncIteration
        assert self.aqueue is not None, "The asyncio event loop was not present during initialization."
        try:
            return json.loads(await self.aqueue.get(timeout=self._timeout))
        except asyncio.TimeoutError:
            self._done = True
            raise StopAsyncIteration from None
