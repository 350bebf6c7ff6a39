"""Where a worker and its frontend listen."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Cluster


@pytest.mark.parametrize("router", ["round-robin", "kv"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_all_is_on_loopback_with_a_frontend_there(cluster: Cluster, host: str, router: str) -> None:
    worker = cluster.worker_with_frontend("--router-mode", router, "--process-tree", host=host)
    assert cluster.chat()[0] == 200
    listening = worker.listening()
    # The frontend for clients and for answers, the status server, the runtime's own behind it, the request plane.
    assert len(listening) >= 5
    assert not [each for each in listening if not each.on_loopback]


def test_where_the_operator_says(cluster: Cluster) -> None:
    hosts = {
        "DYN_TCP_RPC_HOST": "127.0.0.2",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.3",
        "DYN_SYSTEM_HOST": "127.0.0.4",
    }
    worker = cluster.worker_with_frontend(**hosts)
    assert cluster.chat()[0] == 200
    assert set(hosts.values()) < {str(each.host) for each in worker.listening()}
