"""The engine inside each rank. Rank 0 schedules and answers; every rank takes part in every iteration."""

from __future__ import annotations

import dataclasses
import os
import pickle
import threading
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams

from . import guided, transfer
from .kv_cache import Allocation, KvCacheManager
from .llm_response import LlmResponse, OutputDelta
from .tokens import TokenSource, Vocabulary

if TYPE_CHECKING:
    from tensorrt_llm.executor.request import GenerationRequest
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

_POLL_SECONDS = 0.0005
_MAX_POLL_SECONDS = 0.005
_DEFAULT_TRANSFER_TIMEOUT_MS = 60_000


@dataclass(slots=True)
class _Sequence:
    """One answer of a request: its tokens, and how many of them the caller has seen."""

    index: int
    source: TokenSource
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] = field(default_factory=list)
    sent: int = 0
    done: bool = False


@dataclass(slots=True)
class _Active:
    """A request that holds KV blocks."""

    request: GenerationRequest
    dp_rank: int
    held: Allocation
    sequences: list[_Sequence]
    remaining_prompt: int
    max_tokens: int
    cached_tokens: int
    guide: list[int] | None
    iterations: int = 0
    first_response: bool = True


@dataclass(slots=True)
class _Plan:
    """What rank 0 tells the others about an iteration."""

    added: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    call: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None
    stop: bool = False


class PyExecutor:
    """The engine of one rank. `enqueue`, `cancel`, `call`, `latest_*` and `kv_cache_capacity` are for rank 0.

    Every rank calls `step` in a loop until `is_shutdown`; ranks other than 0 wait in it for rank 0. All methods may
    be called from any thread. Environment: TLLM_STANDIN_LOAD_SECONDS (0.2), TLLM_STANDIN_STEP_SECONDS (0.005),
    TLLM_STANDIN_KV_BLOCKS (2048), where `kv_cache_config.max_tokens` does not say it.
    """

    def __init__(self, args: TorchLlmArgs, comm: Any) -> None:
        self.args = args
        self._comm = comm
        self._rank: int = comm.Get_rank()
        self._size: int = comm.Get_size()
        self._step_seconds = float(os.environ.get("TLLM_STANDIN_STEP_SECONDS", "0.005"))
        time.sleep(float(os.environ.get("TLLM_STANDIN_LOAD_SECONDS", "0.2")))
        self.vocabulary = Vocabulary.of(str(args.model))
        self.max_seq_len = args.max_seq_len or self.vocabulary.positions
        self.is_shutdown = False
        self.asleep: set[str] = set()
        self.loras: dict[int, str] = {}
        self.profiling = False
        self._iteration = 0
        self._lock = threading.RLock()
        self._waiting: list[GenerationRequest] = []
        self._cancelled: set[int] = set()
        self._active: dict[int, _Active] = {}
        self._fetching: dict[int, tuple[_Active, list[Any]]] = {}
        self._sending: dict[bytes, tuple[_Active, float]] = {}
        self._delivered: deque[bytes] = deque()
        self._sender: transfer.TransferSender | None = None
        self._stats: deque[dict[str, Any]] = deque(maxlen=args.max_stats_len if args.max_stats_len >= 0 else None)
        cache = args.kv_cache_config
        blocks = int(os.environ.get("TLLM_STANDIN_KV_BLOCKS", "2048"))
        if cache.max_tokens:
            blocks = max(cache.max_tokens // cache.tokens_per_block, 1)
        dp = args.tensor_parallel_size if args.enable_attention_dp else 1
        self._caches = [
            KvCacheManager(
                blocks,
                cache.tokens_per_block,
                cache.enable_block_reuse,
                cache.event_buffer_max_size,
                rank if args.enable_attention_dp else None,
                self.max_seq_len,
            )
            for rank in range(dp)
        ]
        if self._rank == 0 and args.cache_transceiver_config is not None:
            self._sender = transfer.TransferSender(self._delivered.append)

    # Requests

    def enqueue(self, request: GenerationRequest) -> None:
        """Queue a request; raises RequestError for one that can never run."""
        self._check(request)
        with self._lock:
            self._waiting.append(request)
            self._waiting.sort(key=lambda queued: -(getattr(queued, "priority", None) or 0.5))

    def cancel(self, request_id: int) -> None:
        """End a request with the next iteration; an unknown one is ignored."""
        with self._lock:
            self._cancelled.add(request_id)

    def idle(self) -> bool:
        """Say whether an iteration would do nothing."""
        with self._lock:
            return not (self._waiting or self._active or self._fetching or self._sending or self._cancelled)

    def _check(self, request: GenerationRequest) -> None:
        from tensorrt_llm.executor.utils import RequestError

        prompt, params = request.prompt_token_ids, request.sampling_params
        if not prompt:
            raise RequestError("the prompt is empty")
        if len(prompt) >= self.max_seq_len:
            raise RequestError(f"prompt length ({len(prompt)}) reaches max_seq_len ({self.max_seq_len})")
        wrong = next((token for token in prompt if not 0 <= token < self.vocabulary.size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is outside the vocabulary of {self.vocabulary.size}")
        cache = self._caches[0]
        if cache.needed(self._total(request)) > cache.max_blocks:
            raise RequestError(f"the request needs more than the {cache.max_blocks} blocks of the KV cache")
        if request.lora_request is not None:
            if not self.args.enable_lora and self.args.lora_config is None:
                raise RequestError("the request names a LoRA adapter, but enable_lora is not set")
            if not os.path.isfile(os.path.join(request.lora_request.lora_path, "adapter_config.json")):
                raise RequestError(f"no adapter_config.json in {request.lora_request.lora_path!r}")
        if params.guided_decoding is not None:
            if self.args.guided_decoding_backend is None:
                raise RequestError("the request asks for guided decoding, but guided_decoding_backend is not set")
            try:
                guided.valid_text(params.guided_decoding)
            except ValueError as error:
                raise RequestError(str(error)) from error
        disaggregated = request.disaggregated_params
        if disaggregated is not None and disaggregated.request_type in ("context_only", "generation_only"):
            if self._sender is None:
                raise RequestError(f"a {disaggregated.request_type} request needs cache_transceiver_config")
            if disaggregated.request_type == "generation_only" and not disaggregated.opaque_state:
                raise RequestError("a generation_only request needs the opaque_state of its prefill")
        rank = _dp_rank(request)
        if rank is not None and self.args.enable_attention_dp and not 0 <= rank < len(self._caches):
            raise RequestError(f"attention_dp_rank: expected 0 to {len(self._caches) - 1}, got {rank}")

    def _total(self, request: GenerationRequest) -> int:
        return min(len(request.prompt_token_ids) + (request.sampling_params.max_tokens or 0), self.max_seq_len)

    # Iterations

    def step(self) -> list[LlmResponse]:
        """Run one iteration on this rank; rank 0 returns what it produced.

        With more than one rank this is two collectives, in which a dead or stopped rank holds up the others.
        """
        if self._rank != 0:
            self._follow()
            return []
        with self._lock:
            plan = _Plan([request.id for request in self._waiting], sorted(self._cancelled))
            started = time.monotonic()
            self._broadcast(plan)
            time.sleep(self._step_seconds)
            responses = self._iterate(started)
            self._join()
            return responses

    def _follow(self) -> None:
        plan = self._broadcast(None)
        if plan.stop:
            self.is_shutdown = True
            return
        if plan.call is not None:
            self._comm.gather(self._run_call(*plan.call), root=0)
            return
        time.sleep(self._step_seconds)
        self._join()

    def _broadcast(self, plan: _Plan | None) -> _Plan:
        if self._size == 1:
            assert plan is not None
            return plan
        payload = pickle.dumps(plan) if plan is not None else b""
        length = array("q", [len(payload)])
        self._wait(self._comm.Ibcast(length, root=0))
        buffer = bytearray(payload) if plan is not None else bytearray(length[0])
        self._wait(self._comm.Ibcast(buffer, root=0))
        return plan if plan is not None else pickle.loads(bytes(buffer))

    def _join(self) -> None:
        self._iteration += 1
        if self._size > 1:
            self._wait(self._comm.Ibarrier())

    def _wait(self, pending: Any) -> None:
        # A blocking collective of Open MPI spins; on few cores that would starve the ranks that do work.
        pause = _POLL_SECONDS
        while not pending.Test():
            time.sleep(pause)
            pause = min(pause * 1.2, _MAX_POLL_SECONDS)

    def _iterate(self, started: float) -> list[LlmResponse]:
        responses = self._end_cancelled()
        self._end_transfers()
        responses += self._finish_fetching()
        self._admit(responses)
        context, context_tokens = 0, 0
        budget = (self.args.max_num_tokens or 8192) * len(self._caches)
        for active in list(self._active.values()):
            active.iterations += 1
            if active.remaining_prompt:
                chunk = min(active.remaining_prompt, budget)
                if not chunk:
                    continue
                budget -= chunk
                context += 1
                context_tokens += chunk
                active.remaining_prompt -= chunk
                if active.remaining_prompt:
                    continue
                self._store(active, active.request.prompt_token_ids)
            responses += self._generate(active)
        self._record(started, context, context_tokens)
        return responses

    def _end_cancelled(self) -> list[LlmResponse]:
        responses = []
        for request_id in self._cancelled:
            queued = next((request for request in self._waiting if request.id == request_id), None)
            if queued is not None:
                self._waiting.remove(queued)
                sequences = [_Sequence(index, None) for index in range(queued.sampling_params.n)]  # type: ignore[arg-type]
            elif request_id in self._active:
                active = self._active.pop(request_id)
                self._release(active)
                sequences = [sequence for sequence in active.sequences if not sequence.done]
            elif request_id in self._fetching:
                active, _ = self._fetching.pop(request_id)
                self._release(active)
                sequences = active.sequences
            else:
                continue
            for sequence in sequences:
                delta = OutputDelta(sequence.index, sequence.tokens[sequence.sent :], finish_reason="cancelled")
                responses.append(LlmResponse(request_id, outputs=[delta], final=sequence is sequences[-1]))
        self._cancelled.clear()
        return responses

    def _admit(self, responses: list[LlmResponse]) -> None:
        limit = (self.args.max_batch_size or 2048) * len(self._caches)
        for request in list(self._waiting):
            if len(self._active) + len(self._fetching) >= limit:
                break
            prompt, lora, salt = request.prompt_token_ids, _lora_id(request), _salt(request)
            rank = self._place(request)
            held = self._caches[rank].acquire(prompt, self._total(request), lora, salt)
            if held is None:
                break
            self._waiting.remove(request)
            active = self._activate(request, rank, held)
            disaggregated = request.disaggregated_params
            if disaggregated is not None and disaggregated.request_type == "generation_only":
                self._start_fetching(active, disaggregated)
            else:
                self._active[request.id] = active

    def _place(self, request: GenerationRequest) -> int:
        if len(self._caches) == 1:
            return 0
        wanted = _dp_rank(request)
        if wanted is not None:
            return wanted
        loads = [0] * len(self._caches)
        for active in self._active.values():
            loads[active.dp_rank] += 1
        return loads.index(min(loads))

    def _activate(self, request: GenerationRequest, rank: int, held: Allocation) -> _Active:
        params, prompt, lora = request.sampling_params, request.prompt_token_ids, _lora_id(request)
        if request.lora_request is not None:
            self.loras[lora] = request.lora_request.lora_name
        cached = held.reused * self._caches[rank].tokens_per_block
        guide = params.guided_decoding
        return _Active(
            request=request,
            dp_rank=rank,
            held=held,
            sequences=[
                _Sequence(index, TokenSource(self.vocabulary, prompt, params, index, lora)) for index in range(params.n)
            ],
            remaining_prompt=len(prompt) - cached,
            max_tokens=self._total(request) - len(prompt),
            cached_tokens=cached,
            guide=guided.valid_tokens(guide, str(self.args.model)) if guide is not None else None,
        )

    def _generate(self, active: _Active) -> list[LlmResponse]:
        """Draw one token for each sequence of a request."""
        request = active.request
        disaggregated = request.disaggregated_params
        context_only = disaggregated is not None and disaggregated.request_type == "context_only"
        interval = request.sampling_params._stream_interval or self.args.stream_interval or 1
        deltas: list[OutputDelta] = []
        for sequence in active.sequences:
            if sequence.done:
                continue
            self._append(active, sequence, self._next_token(active, sequence))
            delta = self._ending(active, sequence, context_only)
            due = request.streaming and (len(sequence.tokens) % interval == 0 or len(sequence.tokens) == 1)
            if not (sequence.done or due):
                continue
            delta.new_tokens = sequence.tokens[sequence.sent :]
            if request.sampling_params.logprobs is not None:
                delta.logprobs = sequence.logprobs[sequence.sent :]
            sequence.sent = len(sequence.tokens)
            deltas.append(delta)
        over = all(sequence.done for sequence in active.sequences)
        if not deltas:
            return []
        if active.first_response and request.sampling_params.prompt_logprobs is not None:
            deltas[0].prompt_logprobs = self._prompt_logprobs(request)
        active.first_response = False
        if over:
            del self._active[request.id]
            if context_only and deltas[0].finish_reason not in ("end_id", "stop_words"):
                deltas[0].disaggregated_params = self._offer(active)
            else:
                if context_only:
                    deltas[0].disaggregated_params = dataclasses.replace(disaggregated)
                self._store(active, request.prompt_token_ids + active.sequences[0].tokens[:-1])
                self._release(active)
        return [
            LlmResponse(
                request.id,
                outputs=[delta],
                cached_tokens=active.cached_tokens,
                decoding_iter=active.iterations,
                context_done=True,
                final=over and delta is deltas[-1],
            )
            for delta in deltas
        ]

    def _next_token(self, active: _Active, sequence: _Sequence) -> int:
        token = sequence.source.draw()
        given = active.request.disaggregated_params
        if (
            not sequence.tokens
            and given is not None
            and given.request_type == "generation_only"
            and given.first_gen_tokens is not None
        ):
            return given.first_gen_tokens[sequence.index]
        if active.guide is not None:
            position = len(sequence.tokens)
            if position < len(active.guide):
                return active.guide[position]
            end = active.request.sampling_params.end_id
            return end if end is not None and end >= 0 else token
        return token

    def _append(self, active: _Active, sequence: _Sequence, token: int) -> None:
        count = active.request.sampling_params.logprobs
        if count is not None:
            sequence.logprobs.append(_logprobs(token, count, self.vocabulary.size))
        sequence.source.push(token)
        sequence.tokens.append(token)

    def _ending(self, active: _Active, sequence: _Sequence, context_only: bool) -> OutputDelta:
        """Find out whether the last token ends the sequence."""
        params, tokens = active.request.sampling_params, sequence.tokens
        delta = OutputDelta(sequence.index)
        if tokens[-1] == params.end_id and not params.ignore_eos:
            delta.finish_reason = "end_id"
        elif len(tokens) >= (params.min_tokens or 0):
            for reason, words in params._stop_sequences():
                if words and tokens[-len(words) :] == words:
                    delta.finish_reason, delta.stop_reason = "stop_words", reason
                    delta.trim = 0 if params.include_stop_str_in_output else len(words)
                    break
        if delta.finish_reason is None and context_only:
            delta.finish_reason = os.environ.get("TLLM_STANDIN_CONTEXT_FINISH", "length")
        if delta.finish_reason is None and len(tokens) >= active.max_tokens:
            delta.finish_reason = "length"
        sequence.done = delta.finish_reason is not None
        return delta

    def _prompt_logprobs(self, request: GenerationRequest) -> list[dict[int, Any]]:
        count = request.sampling_params.prompt_logprobs or 0
        return [_logprobs(token, count, self.vocabulary.size) for token in request.prompt_token_ids]

    # KV blocks

    def _store(self, active: _Active, tokens: list[int]) -> None:
        request = active.request
        name = request.lora_request.lora_name if request.lora_request is not None else None
        self._caches[active.dp_rank].store(active.held, tokens, _lora_id(request), _salt(request), name)

    def _release(self, active: _Active) -> None:
        self._caches[active.dp_rank].release(active.held)

    def _transfer_timeout(self) -> float:
        config = self.args.cache_transceiver_config
        return ((config and config.kv_transfer_timeout_ms) or _DEFAULT_TRANSFER_TIMEOUT_MS) / 1000

    def _offer(self, active: _Active) -> DisaggregatedParams:
        assert self._sender is not None
        request = active.request
        given = request.disaggregated_params
        assert given is not None
        prompt = request.prompt_token_ids
        data = transfer.block_bytes(prompt, self._caches[active.dp_rank].needed(len(prompt)))
        key, state = self._sender.offer(data)
        self._sending[key] = (active, time.monotonic() + self._transfer_timeout())
        return DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=[sequence.tokens[-1] for sequence in active.sequences],
            first_gen_log_probs=[list(sequence.logprobs) for sequence in active.sequences]
            if request.sampling_params.logprobs is not None
            else None,
            ctx_request_id=given.disagg_request_id if given.disagg_request_id is not None else request.id,
            opaque_state=state,
            disagg_request_id=given.disagg_request_id,
            ctx_dp_rank=active.dp_rank,
            ctx_info_endpoint=given.ctx_info_endpoint,
            schedule_style=given.schedule_style,
        )

    def _end_transfers(self) -> None:
        while self._delivered:
            entry = self._sending.pop(self._delivered.popleft(), None)
            if entry is not None:
                self._release(entry[0])
        now = time.monotonic()
        for key in [key for key, (_, deadline) in self._sending.items() if now >= deadline]:
            active, _ = self._sending.pop(key)
            assert self._sender is not None
            self._sender.withdraw(key)
            self._release(active)

    def _start_fetching(self, active: _Active, given: DisaggregatedParams) -> None:
        outcome: list[Any] = []
        state, timeout = given.opaque_state, self._transfer_timeout()
        assert state is not None

        def run() -> None:
            try:
                outcome.append(transfer.fetch(state, timeout))
            except (OSError, ValueError, KeyError) as error:
                outcome.append(error)

        self._fetching[active.request.id] = (active, outcome)
        threading.Thread(target=run, name="kv_transfer_fetch", daemon=True).start()

    def _finish_fetching(self) -> list[LlmResponse]:
        responses = []
        for request_id, (active, outcome) in list(self._fetching.items()):
            if not outcome:
                continue
            del self._fetching[request_id]
            if isinstance(outcome[0], Exception):
                self._release(active)
                error = f"KV cache transfer failed: {outcome[0]}"
                responses.append(LlmResponse(request_id, error=error, final=True))
                continue
            active.remaining_prompt = 0
            self._active[request_id] = active
            self._store(active, active.request.prompt_token_ids)
            responses += self._generate(active)
        return responses

    # Statistics and events

    def _record(self, started: float, context: int, context_tokens: int) -> None:
        if not self.args.enable_iter_perf_stats:
            return
        for rank, cache in enumerate(self._caches):
            mine = [active for active in self._active.values() if active.dp_rank == rank]
            generating = [active for active in mine if not active.remaining_prompt]
            moving = [active for active, _ in [*self._fetching.values(), *self._sending.values()]]
            transfers = sum(active.dp_rank == rank for active in moving)
            first = rank == 0
            entry: dict[str, Any] = {
                "iter": self._iteration,
                "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
                "iterLatencyMS": (time.monotonic() - started) * 1000,
                "numActiveRequests": len(mine) + transfers,
                "numQueuedRequests": len(self._waiting) if first else 0,
                "maxNumActiveRequests": self.args.max_batch_size,
                "kvCacheStats": cache.stats(),
                "inflightBatchingStats": {
                    "numScheduledRequests": len(mine),
                    "numContextRequests": context if first else 0,
                    "numGenRequests": len(generating),
                    "numPausedRequests": 0,
                    "numPausedKvTokens": 0,
                    "numCtxTokens": context_tokens if first else 0,
                    "numCtxKvTokens": sum(active.cached_tokens for active in mine if active.remaining_prompt),
                    "numGenKvTokens": sum(
                        len(active.request.prompt_token_ids) + len(active.sequences[0].tokens) for active in generating
                    ),
                    "numQueuedContextRequests": len(self._waiting) if first else 0,
                    "numQueuedCtxTokens": sum(len(request.prompt_token_ids) for request in self._waiting)
                    if first
                    else 0,
                    "numQueuedGenRequests": 0,
                    "numQueuedGenKvTokens": 0,
                    "microBatchId": 0,
                },
            }
            if self.args.enable_attention_dp:
                entry["attentionDpRank"] = rank
            self._stats.append(entry)

    def latest_stats(self) -> list[dict[str, Any]]:
        """Return the statistics of the iterations since the last call; none without `enable_iter_perf_stats`."""
        with self._lock:
            entries = list(self._stats)
            self._stats.clear()
            return entries

    def latest_kv_events(self) -> list[dict[str, Any]]:
        """Return the KV events since the last call, of all attention-DP ranks."""
        with self._lock:
            return [event for cache in self._caches for event in cache.drain_events()]

    def kv_cache_capacity(self) -> dict[str, int]:
        """Return the size of the pool of one attention-DP rank."""
        cache = self._caches[0]
        return {
            "maxNumBlocks": cache.max_blocks,
            "tokensPerBlock": cache.tokens_per_block,
            "maxNumTokens": cache.max_blocks * cache.tokens_per_block,
        }

    # Calls on every rank

    def call(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Run a method on every rank, from rank 0; return the ranks' results in order.

        Raises AttributeError for an unknown method, and the first rank's exception.
        """
        with self._lock:
            if self._size == 1:
                results = [self._run_call(method, args, kwargs or {})]
            else:
                self._broadcast(_Plan(call=(method, args, kwargs or {})))
                results = self._comm.gather(self._run_call(method, args, kwargs or {}), root=0)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _run_call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = _CALLS.get(method)
        try:
            if target is None:
                raise AttributeError(f"the worker has no method {method!r}")
            return target(self, *args, **kwargs)
        except Exception as error:
            return error

    def sleep(self, sleep_tags: list[str]) -> None:
        """Release the memory of the named parts; needs `sleep_config`."""
        if self.args.sleep_config is None:
            raise ValueError("sleep needs sleep_config")
        self.asleep.update(sleep_tags)
        if "kv_cache" in sleep_tags:
            self.reset_prefix_cache()

    def wakeup(self, wakeup_tags: list[str]) -> None:
        """Take the memory of the named parts again."""
        if self.args.sleep_config is None:
            raise ValueError("wakeup needs sleep_config")
        self.asleep.difference_update(wakeup_tags)

    def reset_prefix_cache(self) -> None:
        """Forget the blocks that no request holds."""
        for cache in self._caches:
            cache.reset()

    def start_profile(self) -> None:
        """Start profiling."""
        self.profiling = True

    def stop_profile(self) -> None:
        """Stop profiling."""
        self.profiling = False

    def shutdown(self) -> None:
        """Let the other ranks leave `step`, and stop serving blocks."""
        if self.is_shutdown:
            return
        self.is_shutdown = True
        if self._sender is not None:
            self._sender.close()
        if self._rank == 0 and self._size > 1:
            self._broadcast(_Plan(stop=True))


_CALLS = {
    name: getattr(PyExecutor, name)
    for name in ("sleep", "wakeup", "reset_prefix_cache", "start_profile", "stop_profile")
}


def _dp_rank(request: GenerationRequest) -> int | None:
    scheduling = request.scheduling_params
    return scheduling.attention_dp_rank if scheduling is not None else None


def _lora_id(request: GenerationRequest) -> int:
    return request.lora_request.lora_int_id if request.lora_request is not None else 0


def _salt(request: GenerationRequest) -> str | None:
    return getattr(request, "cache_salt", None)


def _logprobs(token: int, count: int, vocabulary: int) -> dict[int, Any]:
    """Make up the log probability of a token, of rank 1, and of the `count - 1` next ones."""
    from tensorrt_llm.executor.result import Logprob

    found = {token: Logprob(logprob=-0.1 - token % 7 / 100, rank=1)}
    for rank in range(2, count + 1):
        found[(token + rank - 1) % vocabulary] = Logprob(logprob=-float(rank), rank=rank)
    return found
