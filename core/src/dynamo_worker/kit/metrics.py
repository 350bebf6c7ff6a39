"""An engine's own Prometheus metrics, and the gauges that Dynamo has for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.core import Metric


class PrefixCollector(Collector):
    """Collects the metrics of the process-wide registry whose names begin with one of some prefixes."""

    def __init__(self, *prefixes: str) -> None:
        self._prefixes = prefixes

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return (metric for metric in REGISTRY.collect() if metric.name.startswith(self._prefixes))


class ComponentCollector(Collector):
    """Collects the gauges ``dynamo_component_…`` about the model and the KV cache, which dashboards and planners read.

    They are computed for each scrape.
    """

    def __init__(
        self,
        load_seconds: float,
        total_blocks: Mapping[int, int],
        used_blocks: Callable[[], Mapping[int, int]],
        hit_rates: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        """Take what the gauges show, by data-parallel rank.

        :param load_seconds: time to load the model, in seconds.
        :param total_blocks: KV blocks.
        :param used_blocks: returns the KV blocks in use, for the ranks that report them; called in a thread.
        :param hit_rates: returns which part of the prompts' tokens the cache had, from 0 to 1; called in a thread.
        """
        self._load_seconds = load_seconds
        self._total_blocks = total_blocks
        self._used_blocks = used_blocks
        self._hit_rates = hit_rates

    def collect(self) -> Iterable[Metric]:
        """Return the gauges."""
        used = self._used_blocks()
        usage = {rank: used[rank] / total for rank, total in self._total_blocks.items() if rank in used and total}
        yield GaugeMetricFamily(
            "dynamo_component_model_load_time_seconds", "Seconds to load the model", value=self._load_seconds
        )
        yield _by_rank("total_blocks", "KV blocks", self._total_blocks)
        yield _by_rank("gpu_cache_usage_percent", "Part of the KV blocks that is in use, from 0 to 1", usage)
        yield _by_rank(
            "kv_cache_hit_rate", "Part of the prompts' tokens that the KV cache had, from 0 to 1", self._hit_rates()
        )


def _by_rank(name: str, documentation: str, values: Mapping[int, float]) -> Metric:
    family = GaugeMetricFamily(f"dynamo_component_{name}", documentation, labels=["dp_rank"])
    for rank, value in values.items():
        family.add_metric([str(rank)], value)
    return family


def engine_registry(*prefixes: str) -> CollectorRegistry:
    """Return a registry with the metrics whose names begin with one of these prefixes."""
    registry = CollectorRegistry()
    registry.register(PrefixCollector(*prefixes))
    return registry
