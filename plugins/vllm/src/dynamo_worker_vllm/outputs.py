"""From vLLM's outputs to Dynamo's chunks, with as little Python per token as possible.

vLLM makes two objects for every token of every request and merges them if the reader is late. For the requests that
ask for tokens and nothing else, nearly all of them, :class:`DeltaProcessor` puts a finished chunk into the reader's
mailbox instead. Everything else (log-probabilities, several answers, KV transfer …) takes vLLM's own way.
"""

from __future__ import annotations

import math
from itertools import compress
from typing import TYPE_CHECKING, Any, Final

from vllm.outputs import STREAM_FINISHED, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker import Chunk

log = get_logger(__name__)

#: Stands for a log-probability of minus infinity, as in vLLM's own server: JSON has no word for it.
LEAST_LOGPROB: Final = -9999.0

#: vLLM's reasons by their names in Dynamo. An error inside the engine is raised instead, so that the request migrates.
FINISH_REASONS: Final = {"stop": "stop", "length": "length", "abort": "cancelled", "repetition": "stop"}

#: What :class:`DeltaProcessor` builds on; with another vLLM that lacks one of these, vLLM's own way is taken.
_FOUNDATION: Final = ("process_outputs", "add_request", "update_scheduler_stats", "_finish_request",
                      "_update_stats_from_output", "_update_stats_from_finished")  # fmt: skip


class DeltaProcessor(OutputProcessor):  # type: ignore[misc]
    """vLLM's output processor with a short way for plain requests.

    :ivar steps: batches of outputs and statistics that came from the engine's processes.
    """

    steps: int = 0

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Register a request, and decide which way its outputs take."""
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

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: Any = None,
    ) -> OutputProcessorOutput:
        """Put what a step of the engine has made into the mailboxes of its readers."""
        states = self.request_states
        count = self._update_stats_from_output if iteration_stats is not None else None
        others: list[Any] | None = None
        for output in engine_core_outputs:
            state = states.get(output.request_id)
            if state is None:
                continue  # aborted meanwhile
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
            queue = state.queue
            if queue.output is None:
                queue.output = {"token_ids": output.new_token_ids, "index": 0}
                queue.ready.set()
            elif isinstance(queue.output, BaseException):  # nothing comes after it
                continue
            else:  # the reader is late
                queue.output["token_ids"] += output.new_token_ids
            reason = output.finish_reason
            if reason is not None:
                chunk = queue.output
                chunk["finish_reason"] = reason
                chunk["stop_reason"] = output.stop_reason
                chunk["cached"] = state.num_cached_tokens
                self._finish_request(state)
                self._update_stats_from_finished(state, reason, iteration_stats)
        if others is None:
            return _NOTHING
        return super().process_outputs(others, engine_core_timestamp, iteration_stats)

    def update_scheduler_stats(self, scheduler_stats: Any) -> None:
        """Take note that the engine has made a step."""
        self.steps += 1
        super().update_scheduler_stats(scheduler_stats)


_NOTHING: Final = OutputProcessorOutput([], [])


def install(llm: AsyncLLM) -> DeltaProcessor | None:
    """Give an engine that has not seen a request yet the short way; return None if it cannot have it."""
    processor = llm.output_processor
    if type(processor) is not OutputProcessor or not all(hasattr(processor, name) for name in _FOUNDATION):
        log.warning("Outputs take vLLM's own way: this version is not known", processor=type(processor).__name__)
        return None
    processor.__class__ = DeltaProcessor
    plain: DeltaProcessor = processor
    return plain


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
    """Return the numbers of tokens of a finished request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens} if cached_tokens else None,
    }


class OutputReader:
    """Makes chunks of what took vLLM's own way, for one request."""

    def __init__(self, prompt_tokens: int, top: int | None, decode: Callable[[int], str] | None) -> None:
        """Start a request.

        :param top: how many of the likeliest tokens were asked for; None or a negative number is all there are.
        :param decode: returns the text of a token; None if there is no tokenizer.
        """
        self._prompt_tokens = prompt_tokens
        self._top = top if top is not None and top >= 0 else None
        self._decode = decode
        self._completion_tokens = 0
        self._prompt_logprobs: list[Any] | None = None

    def read(self, output: RequestOutput) -> Iterator[Chunk]:
        """Yield the chunks of one output."""
        if output is STREAM_FINISHED:
            return
        if output.prompt_logprobs:  # comes once, belongs into the last chunk
            self._prompt_logprobs = [self._prompt_position(position) for position in output.prompt_logprobs]
        for completion in output.outputs:
            tokens = list(completion.token_ids)
            self._completion_tokens += len(tokens)
            chunk: Chunk = {"token_ids": tokens, "index": completion.index}
            if completion.logprobs and tokens:
                self._add_logprobs(chunk, tokens, completion.logprobs)
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

    def _add_logprobs(self, chunk: Chunk, tokens: Sequence[int], logprobs: Sequence[Any]) -> None:
        chosen, top = [], []
        for token, position in zip(tokens, logprobs, strict=False):
            entry = position.get(token)
            if entry is None:  # without the chosen token's the lists would not match the tokens
                return
            chosen.append(finite(entry.logprob))
            # vLLM adds the chosen token where it is none of the likeliest.
            likeliest = (self._top is None or (value.rank or 0) <= self._top for value in position.values())
            top.append([self._entry(other, position[other]) for other in compress(position, likeliest)])
        if len(chosen) == len(tokens):
            chunk["log_probs"] = chosen
            chunk["top_logprobs"] = top

    def _entry(self, token: int, value: Any) -> dict[str, Any]:
        text = self._text(token, value)
        return {
            "rank": value.rank or 0,
            "token_id": token,
            "token": text,
            "logprob": finite(value.logprob),
            "bytes": None if text is None else list(text.encode(errors="replace")),
        }

    def _prompt_position(self, position: Any) -> dict[str, dict[str, Any]] | None:
        if position is None:
            return None
        entries = {}
        for token, value in position.items():
            entry: dict[str, Any] = {"logprob": finite(value.logprob)}
            if value.rank is not None:
                entry["rank"] = int(value.rank)
            text = self._text(token, value)
            if text is not None:
                entry["decoded_token"] = text
            entries[str(token)] = entry
        return entries

    def _text(self, token: int, value: Any) -> str | None:
        if value.decoded_token is not None:
            text: str = value.decoded_token
            return text
        return None if self._decode is None else self._decode(token)


def finite(value: float) -> float:
    """Return a number that JSON can carry."""
    return float(value) if math.isfinite(value) else LEAST_LOGPROB
