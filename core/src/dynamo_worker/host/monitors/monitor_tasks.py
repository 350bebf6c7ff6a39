"""The tasks that run monitors: a monitor that fails is logged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Coroutine

log = get_logger(__name__)


class MonitorTasks:
    """Runs monitors until they are stopped, and logs one that fails: an engine's ``progress`` may raise."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, monitor: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a monitor, and return its task for :meth:`stop_one`."""
        task = asyncio.ensure_future(self._run(monitor))
        self._tasks.add(task)
        return task

    def stop_one(self, task: asyncio.Task[None]) -> None:
        """Stop one monitor; do nothing if it was stopped before."""
        if task in self._tasks:
            self._tasks.remove(task)
            task.cancel()

    def stop(self) -> None:
        """Stop all monitors."""
        for task in list(self._tasks):
            self.stop_one(task)

    async def _run(self, monitor: Coroutine[Any, Any, None]) -> None:
        try:
            await monitor
        except BaseException as error:
            if asyncio.current_task() in self._tasks:  # otherwise it was stopped
                log.error("Monitor failed; the worker continues without it", exc_info=error)
