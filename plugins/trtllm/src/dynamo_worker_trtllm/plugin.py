"""The hooks of the TensorRT-LLM engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker import EnginePlugin

if TYPE_CHECKING:
    import argparse


class TrtllmPlugin(EnginePlugin):
    """Connects TensorRT-LLM with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_trtllm.engine:TrtllmEngine"
    headless_engine = "dynamo_worker_trtllm.nodes:Follower"
    arguments = "dynamo_worker_trtllm.arguments:add"
    abbreviated_flags = True

    def is_headless(self, args: argparse.Namespace) -> bool:  # noqa: ARG002 - the launcher's environment tells it
        """Return whether this worker is a rank of an MPI job whose first rank serves."""
        from dynamo_worker.kit import mpi_job

        return mpi_job.rank() > 0


plugin = TrtllmPlugin()
