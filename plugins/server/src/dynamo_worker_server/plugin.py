"""The hooks of the server engine."""

from __future__ import annotations

from dynamo_worker import EnginePlugin


class ServerPlugin(EnginePlugin):
    """Connects a server with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_server.engine:ServerEngine"
    arguments = "dynamo_worker_server.arguments:add"
    takes_command = True


plugin = ServerPlugin()
