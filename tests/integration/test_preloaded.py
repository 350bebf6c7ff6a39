"""The processes that are preloaded while the command line is read do not start over when the engine uses them."""

from __future__ import annotations

from pathlib import Path

from dynamo_worker.kit import preload
from dynamo_worker.testing import Cluster

PLUGINS = Path(__file__).parents[1] / "plugins"


def test_what_the_worker_sets_until_it_serves_is_no_reason_to_start_over(cluster: Cluster) -> None:
    """It costs a start of vLLM ten seconds."""
    worker = cluster.start_worker("--engine", "echo", "-p", "preloading", PYTHONPATH=str(PLUGINS)).wait_ready()
    changed = worker.wait_log(r"preloading: preloading changed=(\S+)")[1].strip('"').split(",")
    assert "DYN_SYSTEM_PORT" in changed
    assert [name for name in changed if not preload._is_of_the_runtime(name)] == []
    worker.stop()
