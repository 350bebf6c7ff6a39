"""Forward-pass metrics of vLLM's schedulers, measured and published in their own processes.

vLLM's statistics do not say which requests an iteration ran, so the scheduler itself is watched: its class, which
``--scheduler-cls`` may name, stays as it is. Measuring happens where it costs no token: mostly in ``schedule``, which
vLLM runs while the model works on the batch before. EngineCores import this module, so it imports little.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from itertools import chain
from operator import mul
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import zmq

from dynamo_worker_vllm.waiting import FORWARD_PASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

#: Version of the format.
_VERSION: Final = 1
#: Seconds without an iteration after which the planner is told that the engine is idle.
_HEARTBEAT_SECONDS: Final = 1.0
#: Seconds for which iterations are collected before they are sent together; the planner looks every few seconds.
_COLLECT_SECONDS: Final = 0.1
#: Messages that wait for a slow reader; later ones are dropped, which their numbers show.
_MOST_WAITING: Final = 10_000
#: Reading a long queue of requests takes at most this part of the scheduler's time.
_QUEUE_SHARE: Final = 0.01


def measured_scheduler(*, vllm_config: VllmConfig, **options: Any) -> Any:
    """Make the scheduler that vLLM would have made, and publish what it does; vLLM calls this in place of the class."""
    from vllm.v1.core.sched.scheduler import Scheduler

    settings = json.loads(os.environ[FORWARD_PASSES])
    vllm_config.scheduler_config.scheduler_cls = settings["scheduler"]
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()(vllm_config=vllm_config, **options)
    if not isinstance(scheduler, Scheduler):
        log.warning("Forward-pass metrics are not published: %s is no vLLM Scheduler", type(scheduler).__name__)
        return scheduler
    rank = vllm_config.parallel_config.data_parallel_index
    try:
        publisher = Publisher(f"{settings['address']}.{rank}", settings["worker_id"], rank)
    except zmq.ZMQError as error:
        log.warning("Forward-pass metrics are not published: %s", error)
        return scheduler
    Measurement(scheduler, publisher)
    return scheduler


class Publisher:
    """Publishes the forward passes of one rank, and heartbeats while there are none. Never waits for a reader.

    A thread sends several at a time: it is the waking of threads for each of them that costs, here and in the worker.
    """

    def __init__(self, address: str, worker_id: str, rank: int) -> None:
        """Listen and start to send.

        :raises zmq.ZMQError: the address cannot be used.
        """
        self._identity = {"version": _VERSION, "worker_id": worker_id, "dp_rank": rank}
        self._encode = msgspec.msgpack.Encoder().encode
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.set(zmq.SNDHWM, _MOST_WAITING)
        self._socket.set(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._count = 0
        self._passes: deque[tuple[float, dict[str, Any], dict[str, Any]]] = deque(maxlen=_MOST_WAITING)
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="forward-passes", daemon=True)
        self._thread.start()

    def publish(self, seconds: float, scheduled: dict[str, Any], queued: dict[str, Any]) -> None:
        """Publish one iteration.

        :param seconds: how long it took.
        :param scheduled: the requests that it ran: :func:`_scheduled`.
        :param queued: those that waited: :func:`_queued`.
        """
        self._passes.append((seconds, scheduled, queued))
        if not self._news.is_set():
            self._news.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            if self._news.wait(_HEARTBEAT_SECONDS):
                self._closed.wait(_COLLECT_SECONDS)
                self._news.clear()
            else:
                self._passes.append((0.0, _NONE_RAN, _NONE_WAIT))
            while self._passes and not self._closed.is_set():
                self._send(*self._passes.popleft())
        self._socket.close()

    def _send(self, seconds: float, scheduled: dict[str, Any], queued: dict[str, Any]) -> None:
        number, self._count = self._count, self._count + 1
        message = {
            **self._identity,
            "counter_id": number,
            "wall_time": seconds,
            "scheduled_requests": scheduled,
            "queued_requests": queued,
        }
        self._socket.send_multipart((b"", number.to_bytes(8, "big"), self._encode(message)), zmq.NOBLOCK)

    def close(self) -> None:
        """Stop; what is not sent is dropped."""
        self._closed.set()
        self._news.set()
        self._thread.join(_HEARTBEAT_SECONDS)


class Measurement:
    """Watches one scheduler by standing in for three of its methods."""

    def __init__(self, scheduler: Any, publisher: Publisher) -> None:
        self._scheduler = scheduler
        self._publisher = publisher
        #: When each batch in flight was scheduled, and what is in it.
        self._in_flight: deque[tuple[float, dict[str, Any]]] = deque()
        #: When the last iteration ended; None if nothing ran since.
        self._ended_at: float | None = None
        self._waiting = QueueReader(scheduler)
        self._schedule: Callable[..., Any] = scheduler.schedule
        self._update: Callable[..., Any] = scheduler.update_from_output
        self._shutdown: Callable[[], None] = scheduler.shutdown
        scheduler.schedule = self.schedule
        scheduler.update_from_output = self.update_from_output
        scheduler.shutdown = self.shutdown

    def schedule(self, *args: Any, **options: Any) -> Any:
        """Schedule a batch and note what is in it."""
        output = self._schedule(*args, **options)
        if output.total_num_scheduled_tokens > 0:
            try:
                self._in_flight.append((time.monotonic(), self._contents(output)))
            except Exception as error:
                self._give_up(error)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        """Process the output of a batch and publish the iteration.

        It lasted since the one before, as batches overlap; the first one after a pause, since it was scheduled.
        """
        arrived_at = time.monotonic()
        result = self._update(scheduler_output, *args, **options)
        if scheduler_output.total_num_scheduled_tokens == 0:
            self._ended_at = None
        elif self._in_flight:
            scheduled_at, scheduled = self._in_flight.popleft()
            seconds = arrived_at - (scheduled_at if self._ended_at is None else self._ended_at)
            self._ended_at = arrived_at
            try:
                self._publisher.publish(seconds, scheduled, self._waiting.read())
            except Exception as error:
                self._give_up(error)
        return result

    def shutdown(self) -> None:
        """Stop publishing, then shut the scheduler down."""
        self._publisher.close()
        self._shutdown()

    def _give_up(self, error: Exception) -> None:
        """Leave the scheduler alone: it serves whether it can be measured or not."""
        log.error("Forward-pass metrics end: this scheduler cannot be measured", exc_info=error)
        self._publisher.close()
        self._scheduler.schedule = self._schedule
        self._scheduler.update_from_output = self._update

    def _contents(self, output: Any) -> dict[str, Any]:
        tokens, requests = output.num_scheduled_tokens, self._scheduler.requests
        prefills = Prefills()
        for new in output.scheduled_new_reqs:
            prefills.add(requests[new.req_id].num_prompt_tokens, tokens[new.req_id], new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        contexts: Sequence[int] = cached.num_computed_tokens
        if 0 in cached.num_output_tokens:  # the next chunk of a long prompt
            contexts = []
            for request_id, computed, generated in zip(
                cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
            ):
                if generated:
                    contexts.append(computed)
                else:
                    prefills.add(requests[request_id].num_prompt_tokens, tokens[request_id], computed)
        return _scheduled(prefills, contexts)


class Prefills:
    """The requests of a batch whose prompts are not complete yet.

    :ivar lengths: of their whole prompts.
    :ivar tokens: number of tokens that the batch computes.
    :ivar context: number of tokens computed before, or found in the cache.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.tokens = self.context = 0

    def add(self, length: int, tokens: int, context: int) -> None:
        """Add one request."""
        self.lengths.append(length)
        self.tokens += tokens
        self.context += context


class QueueReader:
    """Reads the queue of a scheduler, a long one not for every iteration."""

    def __init__(self, scheduler: Any) -> None:
        from vllm.v1.request import RequestStatus

        self._scheduler = scheduler
        self._decoding = (RequestStatus.PREEMPTED, RequestStatus.WAITING_FOR_REMOTE_KVS)
        self._last = _NONE_WAIT
        self._next_at = 0.0

    def read(self) -> dict[str, Any]:
        """Return the requests that wait, as of a moment ago if there are many."""
        started_at = time.monotonic()
        if started_at >= self._next_at:
            self._last = self._read()
            ended_at = time.monotonic()
            self._next_at = ended_at + (ended_at - started_at) / _QUEUE_SHARE
        return self._last

    def _read(self) -> dict[str, Any]:
        prompts, contexts = [], []
        # Requests that hold KV blocks have a queue of their own.
        for request in chain(self._scheduler.waiting, getattr(self._scheduler, "kv_holding_waiting", ())):
            if request.status in self._decoding:
                contexts.append(request.num_computed_tokens)
            else:
                prompts.append(request.num_tokens)
        return _queued(prompts, contexts)


class _Sums(NamedTuple):
    """Number, sum and population variance of some integers."""

    number: int
    total: int
    variance: float

    @classmethod
    def of(cls, values: Sequence[int]) -> _Sums:
        number = len(values)
        if not number:
            return cls(0, 0, 0.0)
        total = sum(values)
        squares = sum(map(mul, values, values))
        return cls(number, total, (number * squares - total * total) / (number * number))


def _scheduled(prefills: Prefills, contexts: Sequence[int]) -> dict[str, Any]:
    """Return the part of a message about the requests that ran.

    :param contexts: tokens in the KV cache of each request that generates.
    """
    prompts, decodes = _Sums.of(prefills.lengths), _Sums.of(contexts)
    return {
        "num_prefill_requests": prompts.number,
        "sum_prefill_tokens": prefills.tokens,
        "var_prefill_length": prompts.variance,
        "sum_prefill_kv_tokens": prefills.context,
        "num_decode_requests": decodes.number,
        "sum_decode_kv_tokens": decodes.total,
        "var_decode_kv_tokens": decodes.variance,
    }


def _queued(lengths: Sequence[int], contexts: Sequence[int]) -> dict[str, Any]:
    """Return the part of a message about the requests that wait.

    :param lengths: tokens of each request whose prompt has to be computed.
    :param contexts: computed tokens of each that was generating or whose KV cache is on its way.
    """
    prompts, decodes = _Sums.of(lengths), _Sums.of(contexts)
    return {
        "num_prefill_requests": prompts.number,
        "sum_prefill_tokens": prompts.total,
        "var_prefill_length": prompts.variance,
        "num_decode_requests": decodes.number,
        "sum_decode_kv_tokens": decodes.total,
        "var_decode_kv_tokens": decodes.variance,
    }


_NONE_RAN: Final = _scheduled(Prefills(), ())
_NONE_WAIT: Final = _queued((), ())
