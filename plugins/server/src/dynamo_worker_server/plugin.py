"""The hooks of the server engine."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dynamo_worker import EnginePlugin

if TYPE_CHECKING:
    from collections.abc import Mapping


class ServerPlugin(EnginePlugin):
    """Connects a server with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_server.engine:ServerEngine"
    arguments = "dynamo_worker_server.arguments:add"
    takes_command = True
    conformance_waivers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "an_unknown_field_of_the_body_is_refused_by_name": "requests are the server's to read: "
            "vLLM warns of such a field, llama.cpp ignores it",
        }
    )


plugin = ServerPlugin()
