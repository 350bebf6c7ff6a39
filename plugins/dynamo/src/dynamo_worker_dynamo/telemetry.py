"""Stand-ins for what Dynamo's own worker gives an engine class to report metrics and load with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dynamo_worker.errors import describe
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from prometheus_client.core import Metric

    from dynamo_worker.kit.publishing import LoadPublisher

log = get_logger(__name__)


class ClassMetrics(Collector):
    """What a class takes for ``EngineMetrics``: collects the texts that it exposes.

    :ivar auto_labels: none, because the worker adds its own to every sample.
    """

    def __init__(self) -> None:
        self.auto_labels: dict[str, str] = {}
        self._texts: list[Callable[[], str]] = []
        self._failed = False

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        """Take a function that returns metrics as text; called in a thread, for each scrape."""
        self._texts.append(callback)

    def register_prometheus_typed_callback(self, callback: Callable[[], Any]) -> None:
        """Ignore what OpenTelemetry would export: it is the same metrics."""

    def collect(self) -> Iterable[Metric]:
        """Return the metrics; those of a class that fails are left out, which is logged once."""
        return [family for text in self._texts for family in self._parsed(text)]

    def _parsed(self, text: Callable[[], str]) -> list[Metric]:
        try:
            return list(text_string_to_metric_families(text()))
        except Exception as error:
            if not self._failed:
                self._failed = True
                log.warning("The metrics of the engine class cannot be read", error=describe(error))
            return []


class Snapshots:
    """What a class takes for ``SnapshotPublisher``: the latest state of the KV cache of each data-parallel rank."""

    def __init__(self, load: LoadPublisher, loop: asyncio.AbstractEventLoop) -> None:
        self._load = load
        self._loop = loop
        self._latest: dict[int, Any] = {}

    def publish(self, rank: int, snapshot: Any) -> None:
        """Take a ``ComponentSnapshot``; called in any thread of the class."""
        self._latest[rank] = snapshot
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._load.publish, rank, int(snapshot.kv_used_blocks))

    def used_blocks(self) -> dict[int, int]:
        """Return the KV blocks in use on each rank."""
        return {rank: int(one.kv_used_blocks) for rank, one in self._latest.copy().items()}

    def hit_rates(self) -> dict[int, float]:
        """Return which part of the prompts' tokens the KV cache had, of the ranks that know."""
        rates = {rank: one.kv_cache_hit_rate for rank, one in self._latest.copy().items()}
        return {rank: float(rate) for rank, rate in rates.items() if rate is not None}
