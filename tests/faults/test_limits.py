"""Resources that run short under a worker that serves: it must not keep requests that others could answer."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.leftovers import Leftovers
from dynamo_worker.testing.limits import limited, possible, shell


def test_a_worker_that_gets_no_more_threads_gives_its_requests_away(cluster: Cluster, no_leftovers: Leftovers) -> None:
    """The runtime needs one for a request now and then: without it requests would wait, and all look well."""
    if not possible("pids"):
        pytest.skip("no limit of tasks can be set here")
    cluster.start_frontend()
    with limited("pids", None, no_leftovers.tmp) as limit:
        arguments = ["--health-check-interval", "1", "--stall-timeout", "0"]
        worker = cluster.worker(*arguments, prefix=limit.prefix)
        for one in (worker, cluster.worker()):
            cluster.wait_routed(one)
        limit.tighten([worker.worker_pid])
        load = cluster.load(6, 40)
        assert worker.wait_gone() == 1
        assert "Fatal error kind=NoThreadsError" in worker.log
        assert all(result.ok for result in load.wait()), load.summary()


@pytest.mark.parametrize("descriptors", [12, 40])
def test_a_start_with_hardly_any_descriptors_is_refused_at_once(cluster: Cluster, descriptors: int) -> None:
    """With 12 the run directory stayed, with 40 it served until it had the first ten clients."""
    worker = cluster.start_worker(prefix=shell(f"ulimit -n {descriptors};"))
    assert worker.wait_gone() == 3
    assert f"the limit of open files is {descriptors}" in worker.log
    assert "Worker started" not in worker.log
