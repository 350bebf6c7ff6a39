"""The hooks of the transformers engine."""

from __future__ import annotations

from dynamo_worker import EnginePlugin


class TransformersPlugin(EnginePlugin):
    """Connects transformers' continuous batching with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_transformers.engine:TransformersEngine"
    arguments = "dynamo_worker_transformers.arguments:add"


plugin = TransformersPlugin()
