"""The engine's own metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric


class EngineMetrics(Collector):
    """What the engine has done and is doing; set on the event loop, collected in a thread.

    :ivar requests: number of requests that were answered to the end.
    :ivar tokens: number of tokens that were sent.
    :ivar running: number of requests that the engine has, running or waiting.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.running = 0

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        yield CounterMetricFamily("transformers:requests", "Requests answered to the end", value=self.requests)
        yield CounterMetricFamily("transformers:generated_tokens", "Tokens sent", value=self.tokens)
        yield GaugeMetricFamily("transformers:running_requests", "Requests in the engine", value=self.running)


class EmbeddingMetrics(Collector):
    """The same of an engine that makes embeddings.

    :ivar requests: number of requests that were answered to the end.
    :ivar inputs: number of inputs that have become vectors.
    :ivar tokens: number of their tokens.
    :ivar running: number of requests that the engine has, running or waiting.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.inputs = 0
        self.tokens = 0
        self.running = 0

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        yield CounterMetricFamily("transformers:requests", "Requests answered to the end", value=self.requests)
        yield CounterMetricFamily("transformers:embedded_inputs", "Inputs that became vectors", value=self.inputs)
        yield CounterMetricFamily("transformers:embedded_tokens", "Tokens of these inputs", value=self.tokens)
        yield GaugeMetricFamily("transformers:running_requests", "Requests in the engine", value=self.running)
