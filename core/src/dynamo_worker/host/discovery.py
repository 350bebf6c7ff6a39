"""The worker's entries in Dynamo's discovery, as far as its engine may change them while it serves."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dynamo.llm import unregister_model

from dynamo_worker.host.model_card import register_adapter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dynamo.runtime import Endpoint

    from dynamo_worker.engine import EngineInfo
    from dynamo_worker.host.registration import Registration


class WorkerDiscovery:
    """Implements :class:`~dynamo_worker.engine.Discovery` for one worker.

    :ivar model: what is registered; None until then.
    :ivar registration: watches the entries and has to know of every change; None where nothing watches.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.model: EngineInfo | None = None
        self.registration: Registration | None = None
        self._endpoint = endpoint
        self._closed = False

    def close(self) -> None:
        """Change nothing any more: the worker leaves discovery for good."""
        self._closed = True

    async def withdraw(self) -> None:
        """Take the worker's endpoint out of discovery: routers send no new requests."""
        async with self._changing() as model:
            if model is not None:
                await self._endpoint.unregister_endpoint_instance()

    async def rejoin(self) -> None:
        """Put the endpoint back."""
        async with self._changing() as model:
            if model is not None:
                await self._endpoint.register_endpoint_instance()

    async def register_adapter(self, name: str) -> None:
        """Register a LoRA adapter as a model of its own."""
        async with self._changing() as model:
            if model is not None:
                await register_adapter(self._endpoint, model, name)

    async def unregister_adapter(self, name: str) -> None:
        """Take the model of a LoRA adapter out of discovery."""
        async with self._changing() as model:
            if model is not None:
                await unregister_model(endpoint=self._endpoint, lora_name=name)

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[EngineInfo | None]:
        """Change entries in this block, if the model is registered and the worker does not stop."""
        watched = contextlib.nullcontext() if self.registration is None else self.registration.changing()
        async with watched:
            yield None if self._closed else self.model
