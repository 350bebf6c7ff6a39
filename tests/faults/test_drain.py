"""Draining: the budget, the endpoints' own ways, late requests, thousands of streams."""

from __future__ import annotations

import signal
import time

import pytest

from dynamo_worker.testing import Cluster, Load
from dynamo_worker.testing.client import chat

from .test_echo import echoed


def test_what_does_not_finish_in_time_is_handed_off(cluster: Cluster) -> None:
    cluster.start_frontend()
    slow = ["--tokens-per-second", "20", "--termination-grace-period", "10", "--grace-period", "0"]
    worker = cluster.worker(*slow)
    cluster.wait_model()
    load = cluster.load(8, 400, prompt="0123456789")
    cluster.wait_routed(cluster.worker("--tokens-per-second", "200"))
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(10) == 0
    assert time.monotonic() - since < 10
    assert "Handing off requests requests=8" in worker.log
    results = load.wait()
    for number, result in enumerate(results):
        assert result.ok, load.summary()
        assert result.text == echoed(f"0123456789{number}", 400)


def test_a_worker_killed_while_it_drains_leaves_no_model_behind(cluster: Cluster) -> None:
    """Its endpoint has left discovery by then, but not the model's card."""
    cluster.start_frontend()
    worker = cluster.worker("--tokens-per-second", "20", "--grace-period", "0")
    cluster.wait_model()
    load = cluster.load(1, 200)
    worker.signal(signal.SIGTERM)
    worker.wait_log("Draining")
    worker.signal(signal.SIGKILL, worker.worker_pid)
    assert worker.wait_gone() == 137
    assert not [path for path in cluster.discovery.rglob("*") if worker.instance in path.name]
    load.wait()


def test_requests_that_come_late_are_served_elsewhere(cluster: Cluster) -> None:
    """Requests all the time, while one of two workers leaves: none is lost, whoever got it."""
    cluster.start_frontend()
    worker = cluster.worker("--tokens-per-second", "100", "--grace-period", "1")
    cluster.worker("--tokens-per-second", "100")
    cluster.wait_model()
    loads = []
    for step in range(40):
        loads.append(Load(cluster.url, [chat("echo", f"late {step}", 50)]))
        if step == 10:
            worker.signal(signal.SIGTERM)
        time.sleep(0.1)
    assert all(load.wait()[0].ok for load in loads), [load.summary() for load in loads]
    assert worker.wait_gone() == 0


@pytest.mark.parametrize("mode", ["complete", "handoff"])
def test_rolling_restarts_under_load(cluster: Cluster, mode: str) -> None:
    """Three restarts of each of two workers; the benchmark `lifecycle.py` does a hundred."""
    cluster.start_frontend()
    arguments = ["--tokens-per-second", "100", "--drain", mode, "--grace-period", "0.5"]
    workers = [cluster.worker(*arguments), cluster.worker(*arguments)]
    cluster.wait_model()
    loads: list[Load] = []
    for _ in range(3):
        for position in (0, 1):
            loads += [Load(cluster.url, [chat("echo", "rolling", 100)]) for _ in range(8)]
            time.sleep(0.3)
            old, workers[position] = workers[position], cluster.worker(*arguments)
            old.signal(signal.SIGTERM)
            assert old.wait_gone() == 0
    for load in loads:
        result = load.wait()[0]
        assert result.ok, load.summary()
        assert result.text == echoed("rolling", 100)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["complete", "handoff", "abort"])
def test_ten_thousand_requests_in_flight(cluster: Cluster, mode: str) -> None:
    cluster.start_frontend()
    worker = cluster.worker(*["--tokens-per-second", "0.5", "--drain", mode, "--grace-period", "0"])
    cluster.wait_model()
    load = cluster.load(10_000, 10)
    if mode == "handoff":
        cluster.worker("--tokens-per-second", "0")
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(60) == 0
    print(f"gone after {time.monotonic() - since:.2f} s")
    results = load.wait(120)
    complete = sum(result.ok for result in results)
    assert complete == (0 if mode == "abort" else 10_000), load.summary()
