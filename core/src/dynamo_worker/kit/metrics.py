"""An engine's own Prometheus metrics, selected from the registry that the whole process shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric


class PrefixCollector(Collector):
    """Collects the metrics of the process-wide registry whose names begin with one of some prefixes."""

    def __init__(self, *prefixes: str) -> None:
        self._prefixes = prefixes

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return (metric for metric in REGISTRY.collect() if metric.name.startswith(self._prefixes))


def engine_registry(*prefixes: str) -> CollectorRegistry:
    """Return a registry with the metrics whose names begin with one of these prefixes."""
    registry = CollectorRegistry()
    registry.register(PrefixCollector(*prefixes))
    return registry
