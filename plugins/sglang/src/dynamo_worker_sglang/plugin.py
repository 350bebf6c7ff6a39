"""The hooks of the SGLang engine. Importing this module imports nothing of SGLang: the list of engines does it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker import hookimpl

if TYPE_CHECKING:
    import argparse

    from dynamo_worker import Deadline, EngineContext
    from dynamo_worker_sglang.engine import SglangEngine
    from dynamo_worker_sglang.nodes import Follower


class SglangPlugin:
    """Connects SGLang with the worker's lifecycle."""

    dynamo_worker_api = "1"

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add SGLang's own flags, and the one that only exists here."""
        from dynamo_worker_sglang import arguments

        arguments.add(parser)

    @hookimpl
    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> SglangEngine | Follower:
        """Return the engine, or this node's part of it; its `start` starts it."""
        if args.node_rank > 0:
            from dynamo_worker_sglang.nodes import Follower

            return Follower(args, context)
        from dynamo_worker_sglang.engine import SglangEngine

        return SglangEngine(args, context)

    @hookimpl
    async def check_health(self, engine: SglangEngine | Follower) -> None:
        """Ask the scheduler; one that hangs does not answer in time."""
        await engine.check_health()

    @hookimpl
    async def drain(self, engine: SglangEngine | Follower, deadline: Deadline) -> None:
        """Wait for KV transfers that decode workers have not fetched yet."""
        await engine.drain(deadline)

    @hookimpl
    async def cleanup(self, engine: SglangEngine | Follower, deadline: Deadline) -> None:
        """End SGLang's processes."""
        await engine.shutdown(deadline)


plugin = SglangPlugin()
