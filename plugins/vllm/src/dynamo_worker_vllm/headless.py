"""Ranks of a multi-node vLLM on a node that serves no requests itself (``--headless``).

The leader, on another node, has the endpoints; here only processes are started, watched and ended. Those that can be
seen from here are all there is: whether they have found their leader, only the leader knows.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vllm.utils.network_utils import get_tcp_uri
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from dynamo_worker import EngineInfo, StartError
from dynamo_worker.kit.engine_processes import EngineProcesses
from dynamo_worker.kit.headless import HeadlessNode
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import arguments
from dynamo_worker_vllm.processes import TITLE

if TYPE_CHECKING:
    import argparse

    from vllm.config import VllmConfig

    from dynamo_worker import Deadline, EngineContext

log = get_logger(__name__)

#: Seconds that processes get to end by themselves.
_TERMINATE_SECONDS = 1.0
_POLL_SECONDS = 0.1


class HeadlessEngine(HeadlessNode):
    """vLLM's processes of one node, without endpoints."""

    TITLE = TITLE

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._context = context
        self._manager: CoreEngineProcManager | MultiprocExecutor | None = None

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the processes, and wait until each has imported vLLM and named itself."""
        config = await asyncio.to_thread(arguments.configure, self._args, self._context.private_dir)
        try:
            self._manager = await asyncio.to_thread(self._build, config)
        except Exception as error:
            raise StartError(f"vLLM does not start: {error}", hint="its own messages stand above this line") from error
        if isinstance(self._manager, CoreEngineProcManager):
            started = {process.pid for process in self._manager.processes}
            while not started <= set(self.processes()):
                if not all(process.is_alive() for process in self._manager.processes):
                    raise StartError("an EngineCore ended during the start", hint="its own messages stand above")
                await asyncio.sleep(_POLL_SECONDS)
        return EngineInfo(model_name=config.model_config.model, model_path=None)

    @staticmethod
    def _build(config: VllmConfig) -> CoreEngineProcManager | MultiprocExecutor:
        parallel = config.parallel_config
        if parallel.node_rank_within_dp > 0:
            log.info("Starting ranks of a leader", leader=f"{parallel.master_addr}:{parallel.master_port}")
            return MultiprocExecutor(config, monitor_workers=False)
        leader = get_tcp_uri(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port)
        log.info("Starting ranks of a leader", leader=leader, ranks=parallel.data_parallel_size_local)
        return CoreEngineProcManager(
            local_engine_count=parallel.data_parallel_size_local,
            start_index=parallel.data_parallel_rank,
            local_start_index=0,
            vllm_config=config,
            local_client=False,
            handshake_address=leader,
            executor_class=Executor.get_class(config),
            log_stats=True,
        )

    async def shutdown(self, deadline: Deadline) -> None:
        """End the processes: ask them, wait, kill what is left."""
        tree = EngineProcesses(TITLE)
        tree.signal_leaders()
        await tree.end(_TERMINATE_SECONDS, deadline)
        if self._manager is not None:
            await asyncio.to_thread(self._manager.shutdown)
