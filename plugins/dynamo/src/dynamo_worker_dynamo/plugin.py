"""The hooks of the engine that runs one of Dynamo's engine classes."""

from __future__ import annotations

from dynamo_worker import EnginePlugin


class DynamoPlugin(EnginePlugin):
    """Connects an ``LLMEngine`` of Dynamo with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_dynamo.engine:DynamoEngine"
    arguments = "dynamo_worker_dynamo.arguments:add"


plugin = DynamoPlugin()
