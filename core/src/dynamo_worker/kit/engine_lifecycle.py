"""The engine's side of the lifecycle hooks, and the error that reports a failed start."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dynamo_worker.errors import StartError
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.deadline import Deadline


log = get_logger(__name__)


class EngineLifecycle:
    """The methods that the hooks of :class:`~dynamo_worker.kit.engine_plugin.EnginePlugin` call.

    Here each does nothing; an engine overrides what it needs. ``docs/plugins.md`` says when each hook is called.
    """

    async def on_ready(self) -> None:
        """Tell others who wait for this engine, such as other nodes, that the worker is ready."""

    async def check_health(self) -> None:
        """Return if the engine is healthy.

        :raises EngineDeadError: it is beyond repair.
        """

    async def drain(self, deadline: Deadline) -> None:
        """Finish or move work that the requests in flight do not show."""

    def mark_failed(self) -> None:
        """Remember that the engine is beyond repair: :meth:`shutdown` need not ask its processes first."""

    async def shutdown(self, deadline: Deadline) -> None:
        """End the engine; do nothing when called again."""


async def shut_down(name: str, function: Callable[[], object], limit: float) -> None:
    """Call an engine's own shutdown in a thread, for an engine whose processes are killed afterwards.

    :param name: the engine's name.
    :param limit: longest wait in seconds.
    """
    try:
        await in_thread(function, name=f"{name}-shutdown", limit=limit)
    except asyncio.TimeoutError:
        log.info("The engine's own shutdown takes too long", engine=name, seconds=limit, next="kill its processes")
    except Exception as error:
        log.warning("The engine's own shutdown failed", engine=name, error=error, next="kill its processes")


def start_error(name: str, error: object) -> StartError:
    """Return the error for an engine that failed to start after it may have written why.

    :param name: the engine's name.
    :param error: what it raised, or a sentence.
    """
    return StartError(f"{name} failed to start: {error}", hint="see the engine's log output above")
