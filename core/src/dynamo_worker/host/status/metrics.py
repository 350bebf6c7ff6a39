"""The worker's Prometheus metrics, added to the runtime's ``/metrics``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.host.requests.serving import RequestRegistry
    from dynamo_worker.supervisor.last_exit import LastExit


class _RegistryCollector(Collector):
    """Reads the request registry on every scrape: counting costs nothing per token."""

    def __init__(self, requests: RequestRegistry) -> None:
        self._requests = requests

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("dynamo_worker_in_flight", "Requests in flight", value=len(self._requests))
        yield CounterMetricFamily(
            "dynamo_worker_chunks", "Response chunks sent, over all requests", value=self._requests.chunks
        )
        outcomes = CounterMetricFamily("dynamo_worker_requests", "Ended requests by outcome", labels=["outcome"])
        for outcome, count in self._requests.outcomes.items():
            outcomes.add_metric([outcome.value], count)
        yield outcomes


class _LabelledCollector(Collector):
    """Collects another registry's metrics with additional labels; those that a sample has already win."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            labelled = Metric(family.name, family.documentation, family.type, family.unit)
            labelled.samples = [
                Sample(sample.name, {**self._labels, **sample.labels}, sample.value, sample.timestamp, sample.exemplar)
                for sample in family.samples
            ]
            yield labelled


class WorkerMetrics:
    """All metrics of one worker."""

    def __init__(self, requests: RequestRegistry) -> None:
        self._registries = [CollectorRegistry()]
        registry = self._registries[0]
        registry.register(_RegistryCollector(requests))
        self._state = Gauge(
            "dynamo_worker_state", "1 for the state the worker is in, 0 for the others", ["state"], registry=registry
        )
        self._drain_phase = Gauge(
            "dynamo_worker_drain_phase",
            "1 for the phase of a drain on request that the worker is in, 0 for the others",
            ["phase"],
            registry=registry,
        )
        self.shutdown_stage_seconds = Gauge(
            "dynamo_worker_shutdown_stage_seconds", "Seconds spent in each stage of the shutdown", ["stage"],
            registry=registry,
        )  # fmt: skip
        self.health_check_seconds = Histogram(
            "dynamo_worker_health_check_seconds",
            "Duration of one round of health checks",
            buckets=(0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30),
            registry=registry,
        )
        self.health_check_failures = Counter(
            "dynamo_worker_health_check_failures",
            "Health checks that failed without showing the engine dead",
            registry=registry,
        )
        self.event_loop_lag = Gauge(
            "dynamo_worker_event_loop_lag_seconds",
            "How late the event loop woke up: the longest delay of the last 5 s",
            registry=registry,
        )
        self.event_loop_delay = Histogram(
            "dynamo_worker_event_loop_delay_seconds",
            "How late the event loop woke up, measured with every heartbeat",
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30),
            registry=registry,
        )
        self.fatal_errors = Counter(
            "dynamo_worker_fatal_errors", "Fatal errors by kind", ["kind"], registry=registry
        )  # fmt: skip
        self.slow_clients = Gauge(
            "dynamo_worker_slow_clients",
            "Streams whose clients do not keep up, including cancelled ones until their frontend releases them",
            registry=registry,
        )
        self.start_seconds = Gauge(
            "dynamo_worker_start_seconds", "Seconds from the start of the process to the first ready", registry=registry
        )
        self.ready = Gauge("dynamo_worker_ready", "1 while /health answers 200, else 0", registry=registry)
        self._deadline = Gauge(
            "dynamo_worker_shutdown_deadline_timestamp_seconds",
            "Unix time at which a shutdown that is not over is cut short; 0 without one",
            registry=registry,
        )
        self._last_exit_at = Gauge(
            "dynamo_worker_last_exit_timestamp_seconds",
            "Unix time at which the worker before this one ended, by the flight records of its place; 0 without one",
            registry=registry,
        )
        self._last_exit_code = Gauge(
            "dynamo_worker_last_exit_code", "Exit code of the worker before this one; 0 without one", registry=registry
        )
        self._last_exit_reason = Gauge(
            "dynamo_worker_last_exit_reason", "1 for the reason for which the worker before this one ended", ["reason"],
            registry=registry,
        )  # fmt: skip
        self._info = Info(
            "dynamo_worker", "The worker's version, its engine, and the model that it serves", registry=registry
        )
        self.set_state(State.STARTING)
        self.set_drain_phase(DrainPhase.SERVING)

    def set_state(self, current: State, deadline: Deadline | None = None) -> None:
        """Show ``current`` as the worker's state, and the deadline of its shutdown, if it has one."""
        for state in State:
            self._state.labels(state.value).set(state is current)
        self._deadline.set(0.0 if deadline is None else time.time() + deadline.remaining())

    def set_last_exit(self, last: LastExit) -> None:
        """Show how the worker before this one ended."""
        self._last_exit_at.set(last.at)
        self._last_exit_code.set(last.code)
        self._last_exit_reason.labels(last.kind.value).set(1)

    def set_info(self, **labels: str) -> None:
        """Show what this worker is."""
        self._info.info(labels)

    def set_drain_phase(self, current: DrainPhase) -> None:
        """Show ``current`` as the phase of a drain on request."""
        for phase in DrainPhase:
            self._drain_phase.labels(phase.value).set(phase is current)

    def add_registry(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        """Add an engine's own metrics.

        :param labels: labels for each of their samples.
        """
        labelled = CollectorRegistry()
        labelled.register(_LabelledCollector(registry, labels))
        self._registries.append(labelled)

    def exposition(self) -> str:
        """Return everything in Prometheus' text format."""
        return "".join(generate_latest(registry).decode() for registry in self._registries)
