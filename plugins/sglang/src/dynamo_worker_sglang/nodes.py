"""The nodes of a multi-node engine: the first one serves, the others follow it.

A follower's schedulers are ready as soon as they have found those of the first node, long before that node serves.
Followers therefore wait for a key that the first node sets in the store where all schedulers met
(``--dist-init-addr``).
"""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from typing import Final

from torch.distributed import TCPStore

from dynamo_worker.kit.engine_lifecycle import start_error
from dynamo_worker.kit.headless import HeadlessNode
from dynamo_worker.logs import get_logger
from dynamo_worker_sglang import arguments
from dynamo_worker_sglang.manager import build, on_failed_process
from dynamo_worker_sglang.processes import KILLED_SECONDS, TITLE

log = get_logger(__name__)

_KEY: Final = "dynamo-worker/first-node"
_POLL_SECONDS = 0.2
_RETRY_SECONDS = 1.0


def _store(address: str) -> TCPStore:
    """Connect to the store of an engine."""
    host, _, port = address.rpartition(":")
    return TCPStore(host.strip("[]"), int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


async def announce(address: str) -> None:
    """Tell the followers that this first node serves; try again until the store has the key."""
    while True:
        try:
            store = await asyncio.to_thread(_store, address)
            await asyncio.to_thread(store.set, _KEY, "serves")
            return
        except RuntimeError as error:
            log.warning(
                "The other nodes still wait: cannot reach the store", address=address, error=error, next="retry"
            )
        await asyncio.sleep(_RETRY_SECONDS)


class Follower(HeadlessNode):
    """The part of an engine on a node that serves no requests itself (``--node-rank`` above 0)."""

    TITLE = TITLE
    # The processes hold nothing that needs an orderly shutdown, and ignore SIGTERM.
    END_SIGNAL = signal.SIGKILL
    END_SECONDS = KILLED_SECONDS

    async def launch(self) -> str:
        """Start the schedulers, and wait until the first node serves."""
        on_failed_process(lambda: None)
        settings = await asyncio.to_thread(arguments.configure, self.args, self.context.private_dir)
        # Kept for as long as this node runs.
        self._processes = await build(settings)
        log.info("Waiting for the first node", address=settings.dist_init_addr)
        try:
            store = await asyncio.to_thread(_store, settings.dist_init_addr)
            while not await asyncio.to_thread(store.check, [_KEY]):
                await asyncio.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise start_error("SGLang", f"the first node is gone: {error}") from error
        return str(settings.served_model_name or settings.model_path)
