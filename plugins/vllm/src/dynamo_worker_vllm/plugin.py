"""The hooks of the vLLM engine. Importing this module imports nothing of vLLM: the list of engines does it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker import EnginePlugin, hookimpl

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dynamo_worker import EngineContext
    from dynamo_worker_vllm.engine import VllmEngine
    from dynamo_worker_vllm.headless import HeadlessEngine


class VllmPlugin(EnginePlugin):
    """Connects vLLM with the worker's lifecycle."""

    dynamo_worker_api = "1"

    @hookimpl
    def prepare(self, arguments: Sequence[str]) -> None:
        """Let the processes that vLLM will start import vLLM now, beside this one."""
        from dynamo_worker_vllm import processes

        processes.begin_imports(arguments)

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add vLLM's own flags, and the few that only exist here."""
        from dynamo_worker_vllm import arguments

        arguments.add(parser)

    @hookimpl
    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> VllmEngine | HeadlessEngine:
        """Return the engine; its `start` starts vLLM."""
        if args.headless:
            from dynamo_worker_vllm.headless import HeadlessEngine

            return HeadlessEngine(args, context)
        from dynamo_worker_vllm.engine import VllmEngine

        return VllmEngine(args, context)

    @hookimpl
    def on_fatal_error(self, engine: VllmEngine | HeadlessEngine | None) -> None:
        """Take note that there is nothing left to shut down in order."""
        if engine is not None:
            engine.condemn()


plugin = VllmPlugin()
