"""From vLLM's outputs to Dynamo's chunks, with as little Python per token as possible.

vLLM makes two objects for every token of every request, and wakes a task of the request to read them. For requests that
ask for tokens and nothing else, nearly all of them, :class:`DeltaProcessor` passes a finished chunk straight to the
client's stream instead. Everything else (log-probabilities, several answers, KV transfer …) takes vLLM's own path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.outputs import STREAM_FINISHED, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from dynamo_worker.kit.chunks import add_logprobs, finite, no_text, prompt_logprobs, usage
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from dynamo_worker.engine import Send
    from dynamo_worker.responses import Chunk

log = get_logger(__name__)

#: Dynamo's names of vLLM's finish reasons. An error inside the engine is raised instead: the request migrates.
FINISH_REASONS: Final = {"stop": "stop", "length": "length", "abort": "cancelled", "repetition": "stop"}

#: What :class:`DeltaProcessor` builds on; if vLLM lacks one of these, all outputs take vLLM's own path.
_FOUNDATION: Final = ("process_outputs", "add_request", "update_scheduler_stats", "_finish_request",
                      "_update_stats_from_output", "_update_stats_from_finished")  # fmt: skip


class DeltaProcessor(OutputProcessor):  # type: ignore[misc]
    """vLLM's output processor with a fast path for plain requests.

    :ivar steps: number of engine steps reported.
    """

    steps: int = 0

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Register a request, and decide which path its outputs take."""
        super().add_request(request, *args, **kwargs)
        state = self.request_states[request.request_id]
        params = request.sampling_params
        state.plain = (
            params is not None
            and state.parent_req is None
            and state.queue is not None
            and state.stream_interval == 1
            and state.output_kind is RequestOutputKind.DELTA
            and params.num_logprobs is None
            and params.prompt_logprobs is None
            and not params.extra_args
            and not self.tracing_enabled
            and not state.streaming_input
        )
        state.send = None
        state.generated = 0

    def connect(self, mailbox: RequestOutputCollector, send: Send) -> Callable[[], None] | None:
        """Pass the chunks of a plain request straight to ``send`` from now on, except for the last one.

        The last chunk, errors, and the outputs of all other requests go into the mailbox.

        :returns: the function that ends this; None if the request is not plain.
        """
        state = self.request_states.get(mailbox.request_id)
        if state is None or not state.plain:
            return None

        def disconnect() -> None:
            state.send = None

        waiting = mailbox.output
        if type(waiting) is dict:
            chunk: Chunk = waiting  # type: ignore[assignment]
            mailbox.output = None
            mailbox.ready.clear()
            send(chunk)
        state.send = send
        return disconnect

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: Any = None,
        **rest: Any,
    ) -> OutputProcessorOutput:
        """Deliver the outputs of an engine step.

        :param rest: further arguments of newer versions of vLLM, for vLLM's own path.
        """
        states = self.request_states
        count = self._update_stats_from_output if iteration_stats is not None else None
        others: list[Any] | None = None
        for output in engine_core_outputs:
            state = states.get(output.request_id)
            if state is None:
                continue  # it has been aborted
            if not state.plain:
                if others is None:
                    others = []
                others.append(output)
                continue
            if count is not None:
                count(state, output, engine_core_timestamp, iteration_stats)
            if state.is_prefilling:
                prefill = output.prefill_stats
                if prefill is not None:
                    state.num_cached_tokens = prefill.num_cached_tokens
                state.is_prefilling = False
            tokens = output.new_token_ids
            state.generated += len(tokens)
            reason = output.finish_reason
            if reason is None and state.send is not None:
                try:
                    state.send({"token_ids": tokens, "index": 0})
                except Exception as error:  # such as a client that is gone; the other requests go on
                    state.send = None
                    state.queue.put(error)
                continue
            queue = state.queue
            if queue.output is None:
                queue.output = {"token_ids": tokens, "index": 0}
                queue.ready.set()
            elif isinstance(queue.output, BaseException):  # nothing comes after it
                continue
            else:
                queue.output["token_ids"] += tokens
            if reason is not None:
                chunk = queue.output
                chunk["finish_reason"] = reason
                chunk["stop_reason"] = output.stop_reason
                chunk["completion_usage"] = usage(state.prompt_len, state.generated, state.num_cached_tokens)
                self._finish_request(state)
                self._update_stats_from_finished(state, reason, iteration_stats)
        if others is None:
            return _NOTHING
        return super().process_outputs(others, engine_core_timestamp, iteration_stats, **rest)

    def update_scheduler_stats(self, scheduler_stats: Any) -> None:
        """Count the engine's steps."""
        self.steps += 1
        super().update_scheduler_stats(scheduler_stats)


_NOTHING: Final = OutputProcessorOutput([], [])


def install(llm: AsyncLLM) -> DeltaProcessor | None:
    """Give an engine that has no requests yet the fast path; return None if its version is unknown."""
    processor = llm.output_processor
    if type(processor) is not OutputProcessor or not all(hasattr(processor, name) for name in _FOUNDATION):
        log.warning(
            "Outputs take vLLM's own path: this version of vLLM is not supported",
            processor=type(processor).__name__,
        )
        return None
    processor.__class__ = DeltaProcessor
    plain: DeltaProcessor = processor
    return plain


def not_begun(llm: AsyncLLM, request_id: str) -> asyncio.Event | None:
    """Return the event of a request's first output; None if there has been one, or there is no such request."""
    processor = llm.output_processor
    for internal in processor.external_req_ids.get(request_id, ()):
        state = processor.request_states.get(internal)
        if state is not None and state.is_prefilling and state.queue is not None:
            ready: asyncio.Event = state.queue.ready
            return ready
    return None


class OutputReader:
    """Makes the chunks of one request whose outputs take vLLM's own path."""

    def __init__(self, prompt_tokens: int, top: int | None, decode: Callable[[int], str | None] = no_text) -> None:
        """Start a request.

        :param top: number of likeliest tokens to report; None or a negative number for all that vLLM returns.
        :param decode: returns the text of a token.
        """
        self._prompt_tokens = prompt_tokens
        self._top = top if top is not None and top >= 0 else None
        self._decode = decode
        self._completion_tokens = 0
        self._prompt_logprobs: list[Any] | None = None

    def read(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Yield the chunks of one output."""
        if output is STREAM_FINISHED:
            return
        if output.prompt_logprobs:  # they come once, and belong to the last chunk
            self._prompt_logprobs = prompt_logprobs(output.prompt_logprobs, self._decode)
        for completion in output.outputs:
            tokens = list(completion.token_ids)
            self._completion_tokens += len(tokens)
            chunk: Any = {"token_ids": tokens, "index": completion.index}
            if completion.logprobs and tokens:
                add_logprobs(chunk, completion.logprobs, self._top, self._decode)
            if completion.cumulative_logprob is not None:
                chunk["cum_log_probs"] = finite(completion.cumulative_logprob)
            if completion.finish_reason is not None:
                chunk["finish_reason"] = completion.finish_reason
                chunk["stop_reason"] = completion.stop_reason
                chunk["completion_usage"] = usage(
                    self._prompt_tokens, self._completion_tokens, output.num_cached_tokens
                )
                if self._prompt_logprobs is not None:
                    chunk["engine_data"] = {"prompt_logprobs": self._prompt_logprobs}
                if output.kv_transfer_params is not None:
                    chunk["kv_transfer_params"] = output.kv_transfer_params
            yield chunk
