"""Resources that run short under a worker that serves: it must not keep requests that others could answer."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.leftovers import Leftovers
from dynamo_worker.testing.limits import limited, possible, shell

if TYPE_CHECKING:
    from pathlib import Path


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


@pytest.mark.parametrize(("tasks", "said"), [(1, "can't start new thread"), (3, "the Dynamo runtime cannot start")])
def test_a_frontend_that_gets_no_threads_says_so(cluster: Cluster, tmp_path: Path, tasks: int, said: str) -> None:
    if not possible("pids"):
        pytest.skip("no limit of tasks can be set here")
    command = [sys.executable, "-m", "dynamo_worker", "frontend", "--http", f"127.0.0.1:{free_port()}"]
    environment = {**os.environ, "DYN_FILE_KV": str(cluster.discovery)}
    with limited("pids", tasks, tmp_path) as limit:
        done = subprocess.run(
            [*limit.prefix, *command], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 3, done.stderr
    assert said in done.stderr.split("dynamo-worker: error: ")[1]
    assert "raise" in done.stderr.split("next: ")[1]


@pytest.mark.parametrize("descriptors", [12, 40])
def test_a_start_with_hardly_any_descriptors_is_refused_at_once(cluster: Cluster, descriptors: int) -> None:
    """With 12 the run directory stayed, with 40 it served until it had the first ten clients."""
    worker = cluster.start_worker(prefix=shell(f"ulimit -n {descriptors};"))
    assert worker.wait_gone() == 3
    assert f"open files or more, got {descriptors} (ulimit -n)" in worker.log
    assert "Worker started" not in worker.log
