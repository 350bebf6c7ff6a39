"""What `/metrics` gains is valid, complete and current."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_worker.deadline import Deadline
from dynamo_worker.host.requests.serving import RequestOutcome, RequestRegistry
from dynamo_worker.host.status.metrics import WorkerMetrics
from dynamo_worker.kit.metrics import ComponentCollector, PrefixCollector
from dynamo_worker.lifecycle import State


def samples(metrics):
    """Parse the exposition as Prometheus does: value by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.exposition())
        for sample in family.samples
    }


def test_every_metric_has_a_type_a_text_and_one_family():
    families = list(text_string_to_metric_families(WorkerMetrics(RequestRegistry()).exposition()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.name.startswith("dynamo_worker_")
        assert family.documentation
        assert family.type != "unknown"


def test_requests_are_read_when_they_are_asked_for():
    async def main():
        requests = RequestRegistry()
        metrics = WorkerMetrics(requests)
        assert samples(metrics)["dynamo_worker_in_flight",] == 0
        entry = requests.admit("r", graceful=True)
        requests.admit("s", graceful=True)
        requests.chunks += 17
        values = samples(metrics)
        assert values["dynamo_worker_in_flight",] == 2
        assert values["dynamo_worker_chunks_total",] == 17
        requests.release(entry, RequestOutcome.HANDED_OFF)
        values = samples(metrics)
        assert values["dynamo_worker_in_flight",] == 1
        assert values["dynamo_worker_requests_total", "handed_off"] == 1

    asyncio.run(main())


def test_every_outcome_is_there_from_the_start():
    """A counter that appears with its first increment hides that increment from ``rate()``."""
    values = samples(WorkerMetrics(RequestRegistry()))
    assert {
        outcome: values["dynamo_worker_requests_total", outcome.value] for outcome in RequestOutcome
    } == dict.fromkeys(RequestOutcome, 0)


@pytest.mark.parametrize("state", State)
def test_one_state_is_set(state):
    metrics = WorkerMetrics(RequestRegistry())
    assert samples(metrics)["dynamo_worker_state", "STARTING"] == 1
    metrics.set_state(State.SERVING)
    metrics.set_state(state)
    values = samples(metrics)
    assert {other: values["dynamo_worker_state", other.value] for other in State} == {
        other: float(other is state) for other in State
    }


def test_a_shutdown_has_a_deadline():
    metrics = WorkerMetrics(RequestRegistry())
    name = "dynamo_worker_shutdown_deadline_timestamp_seconds"
    assert samples(metrics)[name,] == 0
    metrics.set_state(State.DRAINING, Deadline.after(30))
    assert abs(samples(metrics)[name,] - time.time() - 30) < 2
    metrics.set_state(State.SERVING)
    assert samples(metrics)[name,] == 0


def test_what_the_worker_is():
    metrics = WorkerMetrics(RequestRegistry())
    metrics.set_info(version="1.2.3", engine="echo", model='a "model"')
    [sample] = [
        sample
        for family in text_string_to_metric_families(metrics.exposition())
        for sample in family.samples
        if sample.name == "dynamo_worker_info"
    ]
    assert (sample.value, sample.labels) == (1, {"version": "1.2.3", "engine": "echo", "model": 'a "model"'})


def test_what_the_worker_measures_is_shown():
    metrics = WorkerMetrics(RequestRegistry())
    metrics.event_loop_delay.observe(0.02)
    metrics.health_check_seconds.observe(0.02)
    metrics.health_check_failures.inc()
    metrics.event_loop_lag.set(0.25)
    metrics.fatal_errors.labels("EngineDeadError").inc()
    metrics.shutdown_stage_seconds.labels("DRAINING").set(3)
    metrics.start_seconds.set(12)
    values = samples(metrics)
    assert values["dynamo_worker_health_check_seconds_count",] == 1
    assert values["dynamo_worker_health_check_seconds_bucket", "0.1"] == 1
    assert values["dynamo_worker_health_check_seconds_bucket", "0.01"] == 0
    assert values["dynamo_worker_health_check_failures_total",] == 1
    assert values["dynamo_worker_event_loop_lag_seconds",] == 0.25
    assert values["dynamo_worker_event_loop_delay_seconds_bucket", "0.05"] == 1
    assert values["dynamo_worker_event_loop_delay_seconds_bucket", "0.01"] == 0
    assert values["dynamo_worker_fatal_errors_total", "EngineDeadError"] == 1
    assert values["dynamo_worker_shutdown_stage_seconds", "DRAINING"] == 3
    assert values["dynamo_worker_start_seconds",] == 12


def test_the_engine_adds_its_own():
    metrics = WorkerMetrics(RequestRegistry())
    registry = CollectorRegistry()
    Counter("vllm_prompt_tokens", "Prompt tokens", ["model"], registry=registry).labels('a "model"\n').inc(5)
    metrics.add_registry(registry, {})
    values = samples(metrics)
    assert values["vllm_prompt_tokens_total", 'a "model"\n'] == 5
    assert values["dynamo_worker_in_flight",] == 0


def test_two_workers_in_one_process_share_nothing():
    first, second = WorkerMetrics(RequestRegistry()), WorkerMetrics(RequestRegistry())
    first.health_check_failures.inc()
    assert samples(second)["dynamo_worker_health_check_failures_total",] == 0


def test_an_engines_own_metrics_of_the_process_wide_registry():
    own, other = Gauge("toy:kv_usage", "Usage"), Gauge("somebody_elses", "Usage")
    try:
        own.set(0.5)
        registry = CollectorRegistry()
        registry.register(PrefixCollector("toy:"))
        text = generate_latest(registry).decode()
    finally:
        REGISTRY.unregister(own)
        REGISTRY.unregister(other)
    assert "toy:kv_usage 0.5" in text
    assert "somebody_elses" not in text


def test_the_engines_series_get_the_workers_labels_and_keep_their_own():
    metrics = WorkerMetrics(RequestRegistry())
    registry = CollectorRegistry()
    Histogram("vllm:seconds", "Seconds", ["model_name"], registry=registry, buckets=(1,)).labels("theirs").observe(2)
    metrics.add_registry(registry, {"model_name": "ours", "dynamo_component": "backend"})
    found = {
        sample.name: sample.labels
        for family in text_string_to_metric_families(metrics.exposition())
        for sample in family.samples
        if family.name == "vllm:seconds"
    }
    assert found["vllm:seconds_sum"] == {"model_name": "theirs", "dynamo_component": "backend"}
    assert found["vllm:seconds_bucket"]["le"] == "+Inf"


def test_dynamos_gauges_of_every_engine():
    used = {0: 10}
    registry = CollectorRegistry()
    registry.register(ComponentCollector(2.5, {0: 40, 1: 40}, lambda: used, lambda: {1: 0.25}))
    metrics = WorkerMetrics(RequestRegistry())
    metrics.add_registry(registry, {"model": "m", "dynamo_component": "backend"})
    values = samples(metrics)
    assert values["dynamo_component_model_load_time_seconds", "backend", "m"] == 2.5
    assert values["dynamo_component_total_blocks", "1", "backend", "m"] == 40
    assert values["dynamo_component_gpu_cache_usage_percent", "0", "backend", "m"] == 0.25
    assert ("dynamo_component_gpu_cache_usage_percent", "1", "backend", "m") not in values, "it does not report"
    assert values["dynamo_component_kv_cache_hit_rate", "1", "backend", "m"] == 0.25
    used[0] = 20
    assert samples(metrics)["dynamo_component_gpu_cache_usage_percent", "0", "backend", "m"] == 0.5
