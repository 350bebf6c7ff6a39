"""The entries of a worker in Dynamo's discovery that its engine may change while it serves."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dynamo.llm import unregister_model

from dynamo_worker.host.discovery.model_card import register_adapter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dynamo.runtime import Endpoint

    from dynamo_worker.engine import EngineInfo
    from dynamo_worker.host.discovery.registration import Registration


class WorkerDiscovery:
    """Implements :class:`~dynamo_worker.engine.Discovery` for one worker.

    :ivar model: the registered model; None until it is registered.
    :ivar registration: keeps the entries in discovery and must know of every change; None if nothing does.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.model: EngineInfo | None = None
        self.registration: Registration | None = None
        self._endpoint = endpoint
        self._closed = False

    def close(self) -> None:
        """Ignore further changes: the worker is about to leave discovery for good."""
        self._closed = True

    async def withdraw(self) -> None:
        """Remove the worker's endpoint from discovery: routers send no new requests."""
        async with self._changing() as model:
            if model is not None:
                await self._endpoint.unregister_endpoint_instance()

    async def rejoin(self) -> None:
        """Put the endpoint back."""
        async with self._changing() as model:
            if model is not None:
                await self._endpoint.register_endpoint_instance()

    async def register_adapter(self, name: str) -> None:
        """Register a LoRA adapter as a separate model."""
        async with self._changing() as model:
            if model is not None:
                await register_adapter(self._endpoint, model, name)

    async def unregister_adapter(self, name: str) -> None:
        """Remove the model of a LoRA adapter from discovery."""
        async with self._changing() as model:
            if model is not None:
                await unregister_model(endpoint=self._endpoint, lora_name=name)

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[EngineInfo | None]:
        """Change entries inside this block, unless it yields None: not registered yet, or leaving for good."""
        watched = contextlib.nullcontext() if self.registration is None else self.registration.changing()
        async with watched:
            yield None if self._closed else self.model
