"""The hooks of the transformers engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker import EnginePlugin, hookimpl

if TYPE_CHECKING:
    import argparse

    from dynamo_worker import Engine, EngineContext


class TransformersPlugin(EnginePlugin):
    """Connects transformers' continuous batching with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_transformers.engine:TransformersEngine"
    arguments = "dynamo_worker_transformers.arguments:add"

    @hookimpl
    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> Engine:
        """Return the engine that the flags choose.

        :raises UsageError: some flags are for the other one.
        """
        from dynamo_worker_transformers import arguments

        arguments.check(args)
        if not args.embedding:
            return super().create_engine(args, context)
        from dynamo_worker_transformers.embedding_engine import TransformersEmbeddingEngine

        return TransformersEmbeddingEngine(args)


plugin = TransformersPlugin()
