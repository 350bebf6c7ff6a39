"""The hooks of the TensorRT-LLM engine."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dynamo_worker import EnginePlugin

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


class TrtllmPlugin(EnginePlugin):
    """Connects TensorRT-LLM with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_trtllm.engine:TrtllmEngine"
    headless_engine = "dynamo_worker_trtllm.nodes:Follower"
    arguments = "dynamo_worker_trtllm.arguments:add"
    abbreviated_flags = True
    conformance_waivers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "cleanup_closes_every_socket": "Open MPI keeps the connection to a rank that has ended until it spawns "
            "again or the process ends: one at any time",
            "processes_are_gone_after_cleanup": "Open MPI's daemon `orted` belongs to the process, and ends with it",
            "create_starts_nothing": "`orted` is still there if the process has had an engine before; a worker has one",
            "an_engine_goes_on_after_a_standstill": "the check stops `orted` together with the ranks, after which Open "
            "MPI stays silent; without it they go on",
        }
    )

    def is_headless(self, args: argparse.Namespace) -> bool:  # noqa: ARG002 - the launcher's environment tells it
        """Return whether this worker is a rank of an MPI job whose first rank serves."""
        from dynamo_worker.kit import mpi_job

        return mpi_job.rank() > 0


plugin = TrtllmPlugin()
