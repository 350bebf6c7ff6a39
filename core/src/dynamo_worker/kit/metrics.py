"""An engine's own Prometheus metrics, picked out of the registry that the whole process shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric


class PrefixCollector(Collector):
    """The metrics of the process-wide registry whose names begin like an engine's own, and no others."""

    def __init__(self, *prefixes: str) -> None:
        self._prefixes = prefixes

    def collect(self) -> Iterable[Metric]:
        """Yield them."""
        return (metric for metric in REGISTRY.collect() if metric.name.startswith(self._prefixes))
