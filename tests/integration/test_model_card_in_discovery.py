"""What routers find in discovery: where a worker is, and the taints that its operator sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.peer_record import card, topology_variables
from dynamo_worker.testing.waiting import eventually

PLACES = ["dynamo.topology/rack=rack-7", "dynamo.topology/zone=zone-a"]


def test_topology_and_taints(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.worker(**topology_variables(tmp_path / "topology"))

    def config() -> dict[str, Any]:
        found: dict[str, Any] = card(cluster.discovery, worker.instance)["runtime_config"]
        return found

    assert config()["topology_domains"] == {"rack": "rack-7", "zone": "zone-a"}
    assert config()["kv_transfer_enforcement"] == "preferred"
    assert config()["taints"] == PLACES
    assert worker.operate("update/model_taints", {"taints": ["slow", "old"]}) == {
        "status": "ok",
        "taints": ["old", "slow"],
    }
    assert config()["taints"] == [*PLACES, "old", "slow"]
    # The worker puts back what it has changed, not what it began with.
    (entry,) = [path for path in (cluster.discovery / "v1" / "mdc").iterdir() if worker.instance in path.name]
    entry.unlink()
    eventually(entry.exists, 20, "the card to return")
    assert config()["taints"] == [*PLACES, "old", "slow"]
    assert worker.operate("control/drain")["status"] == "success"
    eventually(lambda: worker.operate("control/drain_status")["phase"] == "drained", 20, "the drain to end")
    assert worker.operate("control/resume")["status"] == "success"
    assert worker.operate("update/model_taints", {"taints": []})["status"] == "ok"
    assert config()["taints"] == PLACES
    worker.stop()


def test_a_missing_place_ends_the_start_with_its_name(cluster: Cluster) -> None:
    result = cluster.run("--engine", "echo", DYN_TOPOLOGY_ENABLED="true")
    assert result.returncode == 3
    assert "DYN_KV_TRANSFER_DOMAIN is not" in result.stderr
