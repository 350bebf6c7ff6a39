"""Draining on request, with a real frontend: requests move or finish, none is lost, and the worker comes back warm."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from dynamo_worker.testing import Cluster, Load, Worker, eventually
from dynamo_worker.testing.client import chat

from .conftest import PLUGINS
from .test_echo import echoed

SLOW = ("--tokens-per-second", "50", "--grace-period", "0.5")


def drain(cluster: Cluster, worker: Worker, *arguments: str) -> None:
    """Drain a worker with the command, and wait until it is drained."""
    result = cluster.run("drain", f"127.0.0.1:{worker.status_port}", "--wait", *arguments)
    assert result.returncode == 0, result.stderr
    assert "drained, the engine is warm" in result.stdout
    assert not in_discovery(cluster, worker)


def resume(cluster: Cluster, worker: Worker) -> None:
    result = cluster.run("resume", f"127.0.0.1:{worker.status_port}")
    assert result.returncode == 0, result.stderr
    assert in_discovery(cluster, worker)


def in_discovery(cluster: Cluster, worker: Worker) -> bool:
    """Return whether routers see the endpoint that serves the model."""
    entries = [path.name for path in cluster.discovery.glob("v1/instances/*") if worker.instance in path.name]
    return any("generate" in name for name in entries)


def completed(worker: Worker) -> float:
    return worker.metric('dynamo_worker_requests_total{outcome="completed"}')


def drained(worker: Worker) -> bool:
    return bool(worker.operate("control/drain_status")["phase"] == "drained")


def two(cluster: Cluster, *arguments: str) -> tuple[Worker, Worker]:
    first, second = cluster.serve(2, *arguments)
    for worker in (first, second):
        cluster.wait_routed(worker)
    return first, second


@pytest.mark.parametrize("mode", ["complete", "handoff"])
def test_requests_finish_or_move_and_the_worker_serves_again(cluster: Cluster, mode: str) -> None:
    worker, other = two(cluster, *SLOW)
    pid = worker.worker_pid
    load = cluster.load(8, 150, prompt="0123456789")
    before = completed(worker)
    handed_off = 'dynamo_worker_requests_total{outcome="handed_off"}'
    drain(cluster, worker, "--mode", mode)
    for number, result in enumerate(load.wait()):
        assert result.ok, load.summary()
        assert result.text == echoed(f"0123456789{number}", 150)
    if mode == "complete":
        assert completed(worker) > before
        assert worker.metric(handed_off) == 0
    else:
        assert worker.metric(handed_off) > 0
    assert worker.status("/live")[0] == 200
    status, body = worker.status("/health")
    assert (status, json.loads(body)["reason"]) == (503, "drained on request")
    assert 'dynamo_worker_drain_phase{phase="drained"} 1.0' in worker.status("/metrics")[1]

    served = completed(worker)
    assert all(cluster.ask(4).ok for _ in range(6))
    assert completed(worker) == served, "the other one serves"

    resume(cluster, worker)
    assert worker.status("/health")[0] == 200
    cluster.wait_routed(worker)
    eventually(lambda: cluster.ask(4).ok and completed(worker) > served, 15, "the worker to serve again")
    assert worker.worker_pid == pid
    for each in (worker, other):
        each.stop()


def test_rolling_by_hand_under_load(cluster: Cluster) -> None:
    """Each of two workers in turn, twice, with requests all the time: none is lost."""
    workers = two(cluster, *SLOW)
    loads: list[Load] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            loads.append(Load(cluster.url, [chat("echo", f"rolling {len(loads)}", 40)]))
            time.sleep(0.1)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for mode in ("complete", "handoff"):
            for worker in workers:
                drain(cluster, worker, "--mode", mode)
                resume(cluster, worker)
    finally:
        over.set()
        asking.join()
    for number, load in enumerate(loads):
        (result,) = load.wait()
        assert result.ok, f"{number} of {len(loads)}: {load.summary()}"
        assert result.text == echoed(f"rolling {number}", 40)


def test_a_drain_that_is_resumed_leaves_its_requests_alone(cluster: Cluster) -> None:
    worker, _ = two(cluster, *SLOW)
    load = cluster.load(6, 150)
    assert worker.operate("control/drain", {"grace_period": 0, "budget": 60})["status"] == "success"
    eventually(lambda: worker.operate("control/drain_status")["phase"] == "draining", 5, "the drain")
    answers = [worker.operate("control/resume") for _ in range(2)]
    assert [answer["phase"] for answer in answers] == ["serving", "serving"]
    assert all(result.ok for result in load.wait()), load.summary()
    assert worker.metric('dynamo_worker_requests_total{outcome="handed_off"}') == 0
    assert in_discovery(cluster, worker)
    assert worker.status("/health")[0] == 200


def test_what_does_not_finish_in_the_budget_moves(cluster: Cluster) -> None:
    worker, _ = two(cluster, *SLOW)
    load = cluster.load(6, 200)
    since = time.monotonic()
    drain(cluster, worker, "--budget", "1", "--grace-period", "0")
    assert time.monotonic() - since < 3 + 2
    assert worker.metric('dynamo_worker_requests_total{outcome="handed_off"}') > 0
    assert all(result.ok for result in load.wait()), load.summary()


def test_a_shutdown_during_a_drain_takes_over(cluster: Cluster) -> None:
    """The shutdown's budget holds, not that of the drain, and what is left moves."""
    worker, _ = two(cluster, *SLOW, "--termination-grace-period", "10")
    load = cluster.load(6, 600)
    worker.operate("control/drain", {"grace_period": 0, "budget": 600})
    eventually(lambda: worker.operate("control/drain_status")["phase"] == "draining", 5, "the drain")
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(12) == 0
    assert time.monotonic() - since < 10
    assert all(result.ok for result in load.wait()), load.summary()
    assert "Cannot unregister endpoint" not in worker.log


def test_a_drained_worker_stops_at_once(cluster: Cluster) -> None:
    worker, other = two(cluster, "--grace-period", "20", "--termination-grace-period", "60")
    drain(cluster, worker, "--grace-period", "0")
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone(10) == 0
    assert time.monotonic() - since < 3, "no router sends it anything, so it need not wait for them"
    assert cluster.ask().ok
    worker = other
    worker.operate("control/drain", {"grace_period": 60, "budget": 100})
    result = cluster.run("drain", str(worker.status_port), "--mode", "handoff", "--wait")
    assert result.returncode == 0, "the second one is faster"


def test_a_drained_engine_is_not_taken_for_a_stalled_one(cluster: Cluster) -> None:
    worker, _ = two(cluster, *SLOW, "--stall-timeout", "1")
    drain(cluster, worker)
    time.sleep(4)
    assert drained(worker)
    assert "Canary request failed" not in worker.log
    resume(cluster, worker)


def test_a_discovery_that_is_gone_for_a_while(cluster: Cluster, tmp_path: Path) -> None:
    """Its entries vanish before the drain; when they are put back, the worker's endpoint is not among them."""
    worker, _ = two(cluster, *SLOW)
    aside = tmp_path / "aside"
    shutil.move(cluster.discovery / "v1", aside)
    worker.operate("control/drain", {"grace_period": 0})
    eventually(lambda: drained(worker), 10, "the drain")
    eventually(lambda: any(worker.instance in path.name for path in cluster.discovery.rglob("*")), 15, "the card")
    time.sleep(2)
    assert not in_discovery(cluster, worker)
    resume(cluster, worker)
    assert worker.status("/health")[0] == 200


def test_the_command_needs_the_token(cluster: Cluster) -> None:
    worker = cluster.worker(*SLOW, DYN_WORKER_CONTROL_TOKEN="secret")
    address = f"127.0.0.1:{worker.status_port}"
    for token, said in ((None, "requires its control token"), ("wrong", "does not accept this control token")):
        result = cluster.run("drain", address, DYN_WORKER_CONTROL_TOKEN=token)
        assert result.returncode == 2
        assert said in result.stderr
    result = cluster.run("drain", address, "--wait", DYN_WORKER_CONTROL_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    worker.stop()
    result = cluster.run("resume", address, DYN_WORKER_CONTROL_TOKEN="secret")
    assert result.returncode == 1
    assert "cannot be reached" in result.stderr


def test_an_engine_that_sleeps_meanwhile(cluster: Cluster) -> None:
    """Neither the engine nor the operator brings back what the other one keeps out."""
    cluster.engine_args = ["--engine", "strict", "--grace-period", "0"]
    worker = cluster.worker(PYTHONPATH=str(PLUGINS))
    for sleep, drained_first in ((True, True), (True, False), (False, True)):
        if sleep and not drained_first:
            assert worker.operate("sleep")["status"] == "success"
            assert not in_discovery(cluster, worker)
        drain(cluster, worker)
        if sleep and drained_first:
            assert worker.operate("sleep")["status"] == "success"
        result = cluster.run("resume", f"127.0.0.1:{worker.status_port}")
        assert result.returncode == 0, result.stderr
        assert ("the engine is paused" in result.stdout) is sleep
        assert in_discovery(cluster, worker) is not sleep
        if sleep:
            assert worker.operate("wake_up")["status"] == "success"
        assert in_discovery(cluster, worker)
    drain(cluster, worker)
    worker.operate("sleep")
    worker.operate("wake_up")
    assert not in_discovery(cluster, worker), "it is drained"
    worker.stop()
    assert "Cannot unregister endpoint" not in worker.log
