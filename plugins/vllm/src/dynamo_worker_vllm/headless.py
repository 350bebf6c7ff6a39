"""Ranks of a multi-node vLLM on a node that serves no requests itself (``--headless``).

The leader, on another node, has the endpoints. Whether the ranks here have found it, only the leader knows.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vllm.utils.network_utils import get_tcp_uri
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from dynamo_worker.kit.engine_lifecycle import start_error
from dynamo_worker.kit.headless import HeadlessNode
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import arguments
from dynamo_worker_vllm.processes import TITLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from dynamo_worker import Deadline

log = get_logger(__name__)

_POLL_SECONDS = 0.1


class HeadlessEngine(HeadlessNode):
    """vLLM's processes on one node, without endpoints."""

    TITLE = TITLE
    _manager: CoreEngineProcManager | MultiprocExecutor | None = None

    async def launch(self) -> str:
        """Start the processes, and wait until each has imported vLLM and set its title."""
        config = await asyncio.to_thread(arguments.configure, self.args, self.context.private_dir)
        try:
            self._manager = await asyncio.to_thread(self._build, config)
        except Exception as error:
            raise start_error("vLLM", error) from error
        if isinstance(self._manager, CoreEngineProcManager):
            started = {process.pid for process in self._manager.processes}
            while not started <= set(self.processes()):
                if not all(process.is_alive() for process in self._manager.processes):
                    raise start_error("vLLM", "an EngineCore process exited")
                await asyncio.sleep(_POLL_SECONDS)
        return str(config.model_config.model)

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
        """End the processes, then let vLLM release what it holds for them."""
        await super().shutdown(deadline)
        if self._manager is not None:
            await asyncio.to_thread(self._manager.shutdown)
