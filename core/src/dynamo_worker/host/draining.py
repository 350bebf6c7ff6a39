"""Ending the requests in flight, for a shutdown as well as for a drain that an operator requests."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dynamo_worker.host.config.drain_mode import Cut, DrainMode
from dynamo_worker.host.drain_progress import SECOND_SIGNAL, DrainProgress
from dynamo_worker.host.requests.serving import SHUTTING_DOWN
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Engine
    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.host.requests.serving import RequestRegistry

log = get_logger(__name__)

#: Seconds for requests that were cut to send their last message.
CUT_SECONDS: Final = 1.0
#: Seconds between the deadline of the hooks and that of their stage: to cancel them, log and continue.
HOOK_MARGIN: Final = 0.3


@dataclass(frozen=True)
class Order:
    """How to drain.

    :param mode: what happens to requests in flight.
    :param deadline: when those that are left are ended.
    :param reason: why, for clients.
    :param hint: what Ctrl-C does meanwhile, for a terminal.
    """

    mode: DrainMode
    deadline: Deadline
    reason: str
    hint: str = SECOND_SIGNAL


async def drain(requests: RequestRegistry, plugins: Plugins, engine: Engine, order: Order) -> None:
    """Refuse new requests; let those in flight finish until the deadline, or end them, depending on the mode."""
    mode, deadline, reason = order.mode, order.deadline, order.reason
    requests.refuse(reason)
    requests.cut(Cut.HANDOFF, graceful=False, reason=reason)
    if not mode.waits:
        requests.cut(mode.cut, reason=reason)
    hooks = asyncio.ensure_future(plugins.drain(engine, deadline.reserve(HOOK_MARGIN)))
    idle = asyncio.ensure_future(requests.wait_idle())
    try:
        with DrainProgress(requests, deadline, mode, order.hint):
            await asyncio.wait({hooks, idle}, timeout=deadline.remaining())
    finally:
        for task in (hooks, idle):
            task.cancel()


async def end_requests(requests: RequestRegistry, how: Cut, reason: str = SHUTTING_DOWN) -> None:
    """End the requests in flight, and wait a moment for their last messages to be sent."""
    cut = requests.cut(how, reason=reason)
    if cut:
        log.info(
            "Handing off requests" if how is Cut.HANDOFF and requests.migrate else "Aborting requests", requests=cut
        )
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
        await asyncio.wait_for(requests.wait_idle(), CUT_SECONDS)
