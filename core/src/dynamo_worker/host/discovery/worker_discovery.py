"""The entries of a worker in Dynamo's discovery that may change while it serves."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from dynamo.llm import unregister_model, update_model_taints

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.host.discovery.model_card import register_adapter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from dynamo.runtime import Endpoint

    from dynamo_worker.engine import EngineInfo
    from dynamo_worker.host.discovery.registration import Registration


class WorkerDiscovery:
    """Implements :class:`~dynamo_worker.engine.Discovery` for one worker.

    Both its engine and its operator may keep the worker out of discovery: it is in when neither does.

    :ivar model: the registered model; None until it is registered.
    :ivar registration: keeps the entries in discovery and must know of every change; None if nothing does.
    """

    def __init__(self, endpoint: Endpoint, path: str = "") -> None:
        """Manage the entries of a worker.

        :param endpoint: the one that serves the model.
        :param path: its name in discovery, ``namespace/component/endpoint``.
        """
        self.model: EngineInfo | None = None
        self.registration: Registration | None = None
        self._main = path
        self._endpoints = {path: endpoint}
        #: Whether each endpoint is in discovery; None: a change has failed, so nobody knows.
        self._in: dict[str, bool | None] = {path: True}
        self._engine_out = False
        self._operator_out = False
        self._closed = False
        self._lock = asyncio.Lock()

    def add(self, endpoint: Endpoint, path: str) -> None:
        """Manage another endpoint of this worker, too."""
        self._endpoints[path] = endpoint
        self._in[path] = True

    @property
    def engine_out(self) -> bool:
        """Whether the engine keeps the worker out of discovery: it is paused or asleep."""
        return self._engine_out

    def withdrawn(self, path: str) -> bool:
        """Return whether an endpoint has left discovery already."""
        return self._in.get(path) is False

    @property
    def present(self) -> bool:
        """Whether any endpoint may be in discovery."""
        return any(known is not False for known in self._in.values())

    def close(self) -> None:
        """Ignore further changes: the worker is about to leave discovery for good."""
        self._closed = True

    async def withdraw(self) -> None:
        """Remove the worker's endpoint from discovery, for the engine: routers send no new requests."""
        async with self._changing() as lost:
            if self.model is not None and not self._closed:
                self._engine_out = True
                await self._apply(lost)

    async def rejoin(self) -> None:
        """Put the endpoint back, for the engine."""
        async with self._changing() as lost:
            if self.model is not None and not self._closed:
                self._engine_out = False
                await self._apply(lost)

    async def leave(self) -> None:
        """Remove all endpoints from discovery, for the operator."""
        async with self._changing() as lost:
            if not self._closed:
                self._operator_out = True
                await self._apply(lost)

    async def enter(self) -> None:
        """Put all endpoints back, for the operator."""
        async with self._changing() as lost:
            if not self._closed:
                self._operator_out = False
                await self._apply(lost)

    async def register_adapter(self, name: str) -> None:
        """Register a LoRA adapter as a separate model."""
        async with self._changing():
            if self.model is not None and not self._closed:
                await register_adapter(self._endpoints[self._main], self.model, name)

    async def unregister_adapter(self, name: str) -> None:
        """Remove the model of a LoRA adapter from discovery."""
        async with self._changing():
            if self.model is not None and not self._closed:
                await unregister_model(endpoint=self._endpoints[self._main], lora_name=name)

    async def set_taints(self, taints: Collection[str]) -> None:
        """Replace the taints of the registered model, except those that follow from where the worker is.

        :raises InvalidRequestError: no model is registered, or the worker is stopping.
        """
        async with self._changing():
            if self.model is None or self._closed:
                raise InvalidRequestError("the worker has no registered model")
            await update_model_taints(self._endpoints[self._main], set(taints))

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[Collection[str]]:
        """Change entries inside this block, one change at a time; yields the endpoints whose entries have vanished."""
        async with self._lock:
            if self.registration is None:
                yield ()
            else:
                async with self.registration.changing() as lost:
                    yield lost or ()

    async def _apply(self, lost: Collection[str]) -> None:
        """Bring every endpoint to where it should be.

        :param lost: endpoints whose entries have vanished, which discovery refuses to remove.
        """
        wanted = {
            path: not (self._operator_out or (self._engine_out and path == self._main)) for path in self._endpoints
        }
        if self.registration is not None:
            self.registration.withdrawn = {path for path, present in wanted.items() if not present}
        for path, endpoint in self._endpoints.items():
            if self._in[path] is wanted[path]:
                continue
            if wanted[path]:
                self._in[path] = None
                await endpoint.register_endpoint_instance()
            elif path not in lost:
                self._in[path] = None
                await endpoint.unregister_endpoint_instance()
            self._in[path] = wanted[path]
