"""Forward-pass metrics for the planner, from the statistics of the ranks' iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo.llm import FpmDirectPublisher

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo.runtime import Endpoint

log = get_logger(__name__)

#: What TensorRT-LLM's statistics call the metrics; of two, the sum.
_FIELDS: Final = {
    "scheduled_num_prefill_requests": ("numContextRequests",),
    "scheduled_sum_prefill_tokens": ("numCtxTokens",),
    "scheduled_sum_prefill_kv_tokens": ("numCtxKvTokens",),
    "scheduled_num_decode_requests": ("numGenRequests",),
    "scheduled_sum_decode_kv_tokens": ("numGenKvTokens",),
    "queued_num_prefill_requests": ("numQueuedContextRequests",),
    "queued_sum_prefill_tokens": ("numQueuedCtxTokens",),
    "queued_num_decode_requests": ("numPausedRequests", "numQueuedGenRequests"),
    "queued_sum_decode_kv_tokens": ("numPausedKvTokens", "numQueuedGenKvTokens"),
}


class ForwardPasses:
    """Publishes the iterations of all data-parallel ranks, from :meth:`attach` on; the runtime adds heartbeats."""

    def __init__(self) -> None:
        self._publisher: FpmDirectPublisher | None = None
        self._ranks = 0

    def attach(self, endpoint: Endpoint, worker_id: int, ranks: int) -> None:
        """Start publishing."""
        self._publisher, self._ranks = FpmDirectPublisher(endpoint, str(worker_id), ranks), ranks
        log.info("Forward-pass metrics are published", ranks=ranks)

    def publish(self, stat: Mapping[str, Any]) -> None:
        """Publish one iteration of one rank.

        A version of TensorRT-LLM that reports only some of the numbers ends it: zeros would tell of an idle engine.
        """
        if self._publisher is None:
            return
        numbers, rank = stat.get("inflightBatchingStats") or {}, int(stat.get("attentionDpRank") or 0)
        try:
            values = {name: sum(int(numbers[key]) for key in keys) for name, keys in _FIELDS.items()}
        except KeyError as missing:
            log.warning("Forward-pass metrics end: TensorRT-LLM does not report all of them", missing=missing.args[0])
            self.stop()
            return
        if rank < self._ranks:
            seconds = float(stat.get("iterLatencyMS") or 0.0) / 1000
            self._publisher.publish(dp_rank=rank, wall_time_secs=seconds, **values)

    def stop(self) -> None:
        """Stop publishing."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.shutdown()
