"""The nodes of an engine that is spread over several: the first one serves, the others follow it.

A follower's schedulers are ready when they have found those of the first node, which still has a good way to go then.
So that nobody takes the engine for ready before it is, the first node leaves a word in the store over which all
schedulers have met (``--dist-init-addr``), and the followers wait for it.
"""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from torch.distributed import TCPStore

from dynamo_worker import EngineInfo, StartError
from dynamo_worker.kit.engine_processes import EngineProcesses
from dynamo_worker.kit.headless import HeadlessNode
from dynamo_worker.logs import get_logger
from dynamo_worker_sglang import arguments
from dynamo_worker_sglang.manager import KILLED_SECONDS, TITLE, Processes, build, in_lasting_thread, on_failed_process

if TYPE_CHECKING:
    import argparse

    from dynamo_worker import Deadline, EngineContext

log = get_logger(__name__)

_WORD: Final = "dynamo-worker/first-node"
_POLL_SECONDS = 0.2


def _store(address: str) -> TCPStore:
    """Connect to the store of an engine."""
    host, _, port = address.rpartition(":")
    return TCPStore(host.strip("[]"), int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


async def announce(address: str) -> None:
    """Tell the followers that the first node serves."""
    store = await asyncio.to_thread(_store, address)
    await asyncio.to_thread(store.set, _WORD, "serves")


class Follower(HeadlessNode):
    """The part of an engine on a node that serves no requests itself (``--node-rank`` above 0)."""

    TITLE = TITLE

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._context = context
        self._processes: Processes | None = None

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the schedulers, and wait until the first node serves."""
        on_failed_process(lambda: None)
        settings = await asyncio.to_thread(arguments.configure, self._args, self._context.private_dir)
        self._processes = await in_lasting_thread(lambda: build(settings))
        log.info("Waiting for the first node", address=settings.dist_init_addr)
        try:
            store = await asyncio.to_thread(_store, settings.dist_init_addr)
            while not await asyncio.to_thread(store.check, [_WORD]):
                await asyncio.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise StartError(f"the first node is gone: {error}") from error
        return EngineInfo(model_name=settings.served_model_name or settings.model_path, model_path=None)

    async def shutdown(self, deadline: Deadline) -> None:
        """End the processes."""
        ending = EngineProcesses(TITLE)
        ending.signal_leaders(signal.SIGKILL)
        await ending.end(KILLED_SECONDS, deadline)
