"""Turns an inference engine into a worker of an NVIDIA Dynamo cluster and manages its lifecycle.

The names below are public: plugins may import them, and ``API_VERSION`` covers them. They are resolved on first use,
because the supervisor process imports this package too and must stay small (standard library only).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import EndpointSpec, Engine, EngineContext, EngineInfo, RequestContext
    from dynamo_worker.errors import EngineDeadError, InvalidRequestError, StartError, UsageError
    from dynamo_worker.exit_codes import ExitCode
    from dynamo_worker.hookspecs import API_VERSION, hookimpl
    from dynamo_worker.kit.engine_plugin import EnginePlugin
    from dynamo_worker.requests import Request
    from dynamo_worker.responses import Chunk

_EXPORTS = {
    "API_VERSION": "hookspecs",
    "Chunk": "responses",
    "Deadline": "deadline",
    "EndpointSpec": "engine",
    "Engine": "engine",
    "EngineContext": "engine",
    "EngineDeadError": "errors",
    "EngineInfo": "engine",
    "EnginePlugin": "kit.engine_plugin",
    "ExitCode": "exit_codes",
    "InvalidRequestError": "errors",
    "Request": "requests",
    "RequestContext": "engine",
    "StartError": "errors",
    "UsageError": "errors",
    "hookimpl": "hookspecs",
}

__all__ = [
    "API_VERSION",
    "Chunk",
    "Deadline",
    "EndpointSpec",
    "Engine",
    "EngineContext",
    "EngineDeadError",
    "EngineInfo",
    "EnginePlugin",
    "ExitCode",
    "InvalidRequestError",
    "Request",
    "RequestContext",
    "StartError",
    "UsageError",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{module}"), name)
