"""The hooks of the SGLang engine. Importing this module imports nothing of SGLang: the list of engines does it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker import EnginePlugin, hookimpl

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dynamo_worker import EngineContext
    from dynamo_worker_sglang.engine import SglangEngine
    from dynamo_worker_sglang.nodes import Follower


class SglangPlugin(EnginePlugin):
    """Connects SGLang with the worker's lifecycle."""

    dynamo_worker_api = "1"

    @hookimpl
    def prepare(self, arguments: Sequence[str]) -> None:
        """Let the processes that SGLang will start import SGLang now, beside this one."""
        from dynamo_worker_sglang import processes

        processes.begin_imports(arguments)

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


plugin = SglangPlugin()
