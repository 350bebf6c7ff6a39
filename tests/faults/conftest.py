"""A cluster whose workers find the plugins in tests/plugins, as if they were installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_worker.testing import Cluster, Worker
from dynamo_worker.testing.etcd_server import Etcd

PLUGINS = Path(__file__).parent.parent / "plugins"


class FaultyCluster:
    """Starts workers with the faulty engine."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.engine_args = ["--engine", "faulty", "--grace-period", "0"]

    def start(self, *arguments: str, **environment: str | None) -> Worker:
        return self.cluster.start_worker(*arguments, PYTHONPATH=str(PLUGINS), **environment)

    def serving(self, *arguments: str, **environment: str | None) -> Worker:
        """Start a frontend if there is none yet, and a worker; wait until it serves."""
        if not self.cluster.url:
            self.cluster.start_frontend()
        worker = self.start(*arguments, **environment).wait_ready()
        self.cluster.wait_model()
        return worker


@pytest.fixture
def faulty(cluster: Cluster) -> FaultyCluster:
    return FaultyCluster(cluster)


@pytest.fixture
def etcd(cluster: Cluster, tmp_path: Path) -> Iterator[Etcd]:
    server = Etcd(tmp_path / "etcd", cluster.environment())
    yield server
    server.kill()
