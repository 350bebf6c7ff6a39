"""The hooks of an engine whose object does the work itself: a plugin derives from :class:`EnginePlugin`.

Like every module of a plugin that is imported with the list of engines, this one is cheap to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from dynamo_worker.hookspecs import hookimpl

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline


class HasLifecycle(Protocol):
    """What the engine's own object has beside :class:`~dynamo_worker.engine.Engine`; see the hooks for each."""

    async def on_ready(self) -> None:
        """Tell whoever waits for the engine, other nodes for one, that the worker is ready."""

    async def check_health(self) -> None:
        """Return if the engine is well; raise ``EngineDeadError`` if it is beyond repair."""

    async def drain(self, deadline: Deadline) -> None:
        """Finish or move work that requests in flight do not show."""

    async def shutdown(self, deadline: Deadline) -> None:
        """End the engine; does nothing when called again."""


class EnginePlugin:
    """The hooks that only pass on to the engine; ``add_arguments`` and ``create_engine`` are the plugin's own.

    Sets no ``dynamo_worker_api``: only the plugin's author knows which version it was written for.
    """

    @hookimpl
    async def on_ready(self, engine: HasLifecycle) -> None:
        """End the processes that were preloaded and not needed; let the engine tell whoever waits for it."""
        from dynamo_worker.kit import preload  # only now: the list of engines imports this module

        preload.dismiss()
        await engine.on_ready()

    @hookimpl
    async def check_health(self, engine: HasLifecycle) -> None:
        """Let the engine say how it is."""
        await engine.check_health()

    @hookimpl
    async def drain(self, engine: HasLifecycle, deadline: Deadline) -> None:
        """Let the engine finish what requests in flight do not show."""
        await engine.drain(deadline)

    @hookimpl
    async def cleanup(self, engine: HasLifecycle, deadline: Deadline) -> None:
        """Let the engine end its processes."""
        await engine.shutdown(deadline)
