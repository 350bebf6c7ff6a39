"""The engine's side of the lifecycle hooks, and the error that reports a failed start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.errors import StartError

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline


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


def start_error(name: str, error: object) -> StartError:
    """Return the error for an engine that failed to start after it may have written why.

    :param name: the engine's name.
    :param error: what it raised, or a sentence.
    """
    return StartError(f"{name} failed to start: {error}", hint="see the engine's log output above")
