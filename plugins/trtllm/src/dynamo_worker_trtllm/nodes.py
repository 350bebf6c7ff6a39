"""An engine over several nodes, started by ``mpirun`` or ``srun`` with one ``dynamo-worker`` for each rank.

TensorRT-LLM's own launcher, ``trtllm-llmapi-launch``, also works with ``dynamo-worker`` as its server, but supervises
nothing else. Here each ``dynamo-worker`` takes its place: on rank 0 it serves and runs the process that connects it
with the ranks; on the others it runs the rank. It ends with that process.
"""

from __future__ import annotations

import os
import secrets
import socket

from dynamo_worker.kit import mpi_job
from dynamo_worker.kit.headless import ChildNode
from dynamo_worker.logs import get_logger

log = get_logger(__name__)

_LOOPBACK = "127.0.0.1"
_PREFIX = "TLLM_SPAWN_PROXY_PROCESS"


def lead() -> None:
    """Start the process that connects this engine with the ranks of the MPI job; do nothing without a job."""
    if not mpi_job.left():
        return
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        address = f"tcp://{_LOOPBACK}:{probe.getsockname()[1]}"
    key = secrets.token_hex(32)
    os.environ |= {_PREFIX: "1", f"{_PREFIX}_IPC_ADDR": address, f"{_PREFIX}_IPC_HMAC_KEY": key}
    os.environ["tllm_mpi_size"] = str(mpi_job.size())  # noqa: SIM112 - TensorRT-LLM's name
    log.info("Leading the ranks of an MPI job", ranks=mpi_job.size())
    mpi_job.join("tensorrt_llm.llmapi.mgmn_leader_node")


class Follower(ChildNode):
    """A rank of an engine whose leader, on rank 0, serves the requests."""

    async def launch(self) -> str:
        """Start the rank, which waits for the leader."""
        os.environ[_PREFIX] = "1"
        self.child = mpi_job.join("tensorrt_llm.llmapi.mgmn_worker_node")
        log.info("Following rank 0 of an MPI job", rank=mpi_job.rank(), ranks=mpi_job.size())
        return str(self.args.model)
