"""What routers and the planner see of vLLM: load, KV events and forward-pass metrics."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo_worker.kit import forward_pass_metrics
from dynamo_worker.kit.publishing import KvEvents
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import forward_passes, waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker.kit.publishing import LoadPublisher

log = get_logger(__name__)


def stat_logger(load: LoadPublisher) -> Callable[[VllmConfig, int], StatLoggerBase]:
    """Return the factory of the objects, one for each data-parallel rank, that vLLM calls after every step."""
    return lambda config, rank: _StatLogger(load, config, rank)


class _StatLogger(StatLoggerBase):  # type: ignore[misc]
    def __init__(self, load: LoadPublisher, config: VllmConfig, rank: int) -> None:
        self._load = load
        self._cache = config.cache_config
        self._ranks = max(1, config.parallel_config.data_parallel_size_local)
        self._rank = rank

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            blocks = (self._cache.num_gpu_blocks or 0) / self._ranks
            self._load.publish(self._rank, round(blocks * scheduler_stats.kv_cache_usage))

    def log_engine_initialized(self) -> None:
        pass


def kv_events(llm: AsyncLLM, ranks: Iterable[int]) -> KvEvents | None:
    """Return where each data-parallel rank publishes its KV events; None if it does not."""
    from vllm.distributed.kv_events import ZmqEventPublisher

    events = llm.vllm_config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        return None
    # With port 0 only the engine knows the port that it listens on.
    known = llm.get_kv_event_sources()
    sources = {
        rank: known[rank].endpoint if rank in known else ZmqEventPublisher.offset_endpoint_port(events.endpoint, rank)
        for rank in ranks
    }
    return KvEvents(sources, events.topic, llm.vllm_config.cache_config.block_size)


def measure_forward_passes(config: VllmConfig, worker_id: int, private_dir: Path) -> None:
    """Have the EngineCores that are started with this configuration publish what their schedulers do.

    :param private_dir: directory of the sockets.
    """
    if config.parallel_config.data_parallel_backend == "ray":
        # It starts them on any machine, with an environment of its own.
        log.warning("Forward-pass metrics are not published: ray starts the EngineCores")
        return
    scheduler = config.scheduler_config
    settings = {
        "scheduler": scheduler.scheduler_cls,
        "worker_id": str(worker_id),
        "address": forward_pass_metrics.address(private_dir),
    }
    os.environ[waiting.FORWARD_PASSES] = json.dumps(settings)
    made_by = forward_passes.measured_scheduler
    scheduler.scheduler_cls = f"{made_by.__module__}.{made_by.__name__}"
