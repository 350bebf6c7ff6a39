"""An engine over several nodes: `mpirun` with one worker for each rank, and TensorRT-LLM's own launcher."""

from __future__ import annotations

import shutil
import signal
import time

import pytest

from dynamo_worker.testing import Cluster, Subject, Worker, eventually
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.serving import needs_gpus

pytestmark = [pytest.mark.timeout(300), needs_gpus(2)]

QUICK = ("--grace-period", "0", "--tensor-parallel-size", "2")
#: Gives each rank's worker a port for its status server.
OWN_PORT = 'shift; port=PORT_$OMPI_COMM_WORLD_RANK; exec "$@" --system-port "${!port}"'


def launcher(name: str) -> str:
    import tensorrt_llm  # noqa: F401 - it finds Open MPI

    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def start(cluster: Cluster, subject: Subject) -> Worker:
    """Start a job of two ranks and wait until it serves."""
    prefix = [launcher("mpirun"), "--oversubscribe", "-n", "2", "bash", "-c", OWN_PORT, "bash", "--"]
    ports = {f"PORT_{rank}": str(free_port()) for rank in range(2)}  # the port after a free one may be taken
    job = cluster.start_worker(*QUICK, prefix=prefix, **ports)
    job.wait_log("Following rank 0 of an MPI job", subject.start_seconds)
    # The follower is ready long before the leader.
    eventually(lambda: subject.model in cluster.models(), 2 * subject.start_seconds, "the leader's model")
    assert cluster.complete()[0] == 200
    return job


def pid_of(job: Worker, module: str) -> int:
    found = [pid for pid, command in job.children().items() if command.endswith(module)]
    assert len(found) == 1, job.children()
    return found[0]


@pytest.mark.parametrize("module", ["mgmn_worker_node", "mgmn_leader_node"])
def test_each_node_ends_with_the_other(cluster: Cluster, subject: Subject, module: str) -> None:
    """The rank's process, or the one that connects the leader with the ranks, is killed."""
    cluster.start_frontend()
    job = start(cluster, subject)
    since = job.signal(signal.SIGKILL, pid_of(job, module))
    assert job.wait_gone(30) != 0
    print(f"gone after {time.monotonic() - since:.3f} s")
    assert "Fatal error kind=EngineDeadError" in job.log
    eventually(lambda: not job.children(), 10, "all processes of the job to be gone")


def test_a_job_that_is_asked_to_end(cluster: Cluster, subject: Subject) -> None:
    cluster.start_frontend()
    job = start(cluster, subject)
    since = job.signal(signal.SIGTERM)
    job.wait_gone(30)
    print(f"gone after {time.monotonic() - since:.3f} s")
    eventually(lambda: not cluster.models(), 10, "the leader to leave discovery")


def test_tensorrt_llms_own_launcher(cluster: Cluster, subject: Subject) -> None:
    """It runs the server beside rank 0, and the ranks unsupervised."""
    cluster.start_frontend()
    prefix = [launcher("mpirun"), "--oversubscribe", "-n", "2", launcher("trtllm-llmapi-launch")]
    job = cluster.start_worker(*QUICK, prefix=prefix)
    job.wait_ready(2 * subject.start_seconds)
    cluster.wait_model()
    assert cluster.complete()[0] == 200
    job.signal(signal.SIGTERM)
    job.wait_gone(30)
    eventually(lambda: not job.registered, 10, "the worker to leave discovery")
    for socket in cluster.tmp.glob("rpc_test_*"):  # of ranks that no worker supervises, and nobody removes
        socket.unlink()
