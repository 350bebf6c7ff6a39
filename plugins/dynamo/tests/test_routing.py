"""What routers and the other half of a divided request see of Dynamo's sample engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.testing import eventually

if TYPE_CHECKING:
    from dynamo_worker.testing import Cluster


def test_prefill_here_and_decode_there(cluster: Cluster) -> None:
    """The router finds both by their type; the decode worker refuses what no prefill worker has seen."""
    cluster.start_frontend()
    workers = [cluster.start_worker("--disaggregation-mode", mode) for mode in ("prefill", "decode")]
    for worker in workers:
        worker.wait_ready()
    cluster.wait_model()
    result = eventually(lambda: (found := cluster.ask(7)).ok and found, 10, "an answer of both")
    assert result.text.split() == [f"w{number}" for number in range(1, 8)]
    prefill, decode = workers
    assert "dynamo.prefill.generate" in prefill.log
    assert prefill.metric("dynamo_worker_requests_total") >= 1
    assert decode.metric("dynamo_worker_requests_total") >= 1
    for worker in workers:
        worker.stop()


def test_events_and_load(cluster: Cluster) -> None:
    """A router that reads KV events makes the class publish them; its thread for that also reports its load."""
    worker = cluster.worker_with_frontend("--disaggregation-mode", "agg", "--router-mode", "kv")
    cluster.wait_model()
    assert cluster.ask(20).ok
    assert worker.metric("dynamo_component_total_blocks") == 1000
    used = "dynamo_component_gpu_cache_usage_percent"
    eventually(lambda: used in worker.status("/metrics")[1], 5, "the class's load")
    load = cluster.load(4, 200)
    eventually(lambda: worker.metric(used) > 0, 10, "blocks in use")
    assert "worker_kv_query" in worker.status("/metrics")[1]  # the router asks for the blocks it has not heard of
    assert worker.metric("dynamo_component_kv_publisher_engines_dropped_events_total") == 0
    assert all(result.ok for result in load.wait()), load.summary()
    worker.stop()
