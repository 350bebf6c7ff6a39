"""A healthy engine is never ended: saturated, in a long prefill, or compiling."""

from __future__ import annotations

import signal
import time

import pytest

from dynamo_worker.testing import Cluster, Load, Worker
from dynamo_worker.testing.fault_table import DEBOUNCE

from .conftest import FaultyCluster

#: A tight bound, so that the tests are short; every quiet spell below is longer than the part of it after which the
#: engine is asked (60 %), or than the whole of it.
STALL_TIMEOUT = "4"


def received(load: Load) -> int:
    """Return the number of chunks with text that all streams together have received."""
    return sum(len(result.chunk_times) for result in load.results)


def end(worker: Worker) -> None:
    assert "Fatal" not in worker.log
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_saturating_load(cluster: Cluster) -> None:
    """More work than any machine can do, for several stall timeouts."""
    streams, rate = 500, 1000  # the engine takes 1000 steps a second at most
    cluster.start_frontend()
    worker = cluster.worker("--stall-timeout", STALL_TIMEOUT, "--process-tree", "--tokens-per-second", str(rate))
    cluster.wait_model()
    load = cluster.load(streams, 100 * rate)  # no stream can end by itself during this test
    seconds, before = 15, received(load)
    time.sleep(seconds)
    assert worker.running, worker.log
    share = (received(load) - before) / (streams * rate * seconds)
    assert 0 < share < 0.5, f"not saturated, or stuck: the clients received {share:.1%} of the full rate"
    assert not any(result.finish_reason or result.error for result in load.results), load.summary()
    assert "Fatal" not in worker.log
    for _ in range(2):  # do not wait for the streams
        worker.signal(signal.SIGTERM)
        time.sleep(DEBOUNCE)
    assert worker.wait_gone() == 143
    load.wait()


def test_a_long_prefill_that_reports_its_steps(cluster: Cluster) -> None:
    cluster.start_frontend()
    worker = cluster.worker("--stall-timeout", STALL_TIMEOUT, "--prefill-seconds", "10", "--no-warmup")
    cluster.wait_model()
    load = cluster.load(1, 5)
    assert all(result.ok for result in load.wait()), load.summary()
    end(worker)


def test_a_first_request_that_compiles(faulty: FaultyCluster) -> None:
    """The warm-up pays for it, before the model is registered and before anybody watches."""
    worker = faulty.serving("--stall-timeout", STALL_TIMEOUT, "--compile-seconds", "8")
    assert "Engine warmed up seconds=8" in worker.log
    assert faulty.cluster.ask().ok
    end(worker)


def test_one_request_that_hangs_for_long_beside_an_idle_engine(faulty: FaultyCluster) -> None:
    """The canary answers, so the engine is well, however long this one request takes."""
    worker = faulty.serving("--stall-timeout", STALL_TIMEOUT, "--silent-seconds", "10")
    result = faulty.cluster.load(1, 5, prompt="silent")
    assert all(one.ok for one in result.wait()), result.summary()
    end(worker)


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_five_minutes_of_saturating_load(cluster: Cluster) -> None:
    """The issue's bar; run it with `-m slow`."""
    cluster.start_frontend()
    worker = cluster.worker("--stall-timeout", "5", "--process-tree", "--tokens-per-second", "1000")
    cluster.wait_model()
    until = time.monotonic() + 300
    while time.monotonic() < until:
        load = cluster.load(300, 1000)
        assert all(result.ok for result in load.wait(300)), load.summary()
    end(worker)
