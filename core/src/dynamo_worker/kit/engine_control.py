"""Control of an engine while it serves: what its operations have in common, and how it leaves discovery for a while.

Each operation is a control route ``/engine/NAME`` of the worker's status server; those that Dynamo's own tools know are
served as endpoints too.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_worker.engine import EndpointSpec
from dynamo_worker.errors import for_client
from dynamo_worker.kit import translation
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    from dynamo_worker.engine import Discovery, EngineContext, Operation
    from dynamo_worker.kit.lora import LoraAdapter, LoraAdapters

log = get_logger(__name__)

_T = TypeVar("_T")


def routes(operations: Mapping[str, Operation]) -> dict[str, Operation]:
    """Return the operations as control routes: errors become answers, ``status`` says which."""
    return {name: _answering(name, operation) for name, operation in operations.items()}


def endpoint(name: str, operation: Operation) -> EndpointSpec:
    """Return the endpoint through which Dynamo's own tools reach an operation."""
    answer = _answering(name, operation)

    async def generate(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:  # noqa: ARG001
        yield await answer(request)

    return EndpointSpec(name, generate=generate, takes_tokens=False)


def _answering(name: str, operation: Operation) -> Operation:
    async def answer(body: Any) -> dict[str, Any]:
        if body is not None and not isinstance(body, dict):
            return {"status": "error", "message": "the body must be a JSON object"}
        try:
            return {"status": "success", **await operation(body or {})}
        except Exception as error:
            log.warning("Control operation failed", operation=name, error=error)
            return {"status": "error", "message": for_client(str(error)) or type(error).__name__}

    return answer


class DiscoveryGate:
    """Whether routers may send requests: an engine that cannot serve for a while is withdrawn from discovery.

    It is withdrawn for a reason, which has a name. It can have several at once, and rejoins when none is left.

    :ivar withdrawn: whether it has left discovery, or is about to; until it is back.
    """

    def __init__(self, discovery: Discovery) -> None:
        self.withdrawn = False
        self._discovery = discovery
        self._lock = asyncio.Lock()
        self._reasons: frozenset[str] = frozenset()

    @property
    def reasons(self) -> frozenset[str]:
        """Why the engine is withdrawn; empty while it serves."""
        return self._reasons

    async def withdraw(self, pause: Callable[[], Awaitable[object]], *reasons: str) -> bool:
        """Leave discovery for these reasons, then ``pause()`` the engine; return False if it has them all already.

        If ``pause`` fails, none of the new reasons counts. Meanwhile :attr:`reasons` are the old ones.
        """
        async with self._lock:
            if self._reasons.issuperset(reasons):
                return False
            try:
                if not self._reasons:
                    await self._leave()
                await pause()
            except BaseException:
                if not self._reasons:
                    await self._rejoin()
                raise
            self._reasons = self._reasons.union(reasons)
            return True

    async def rejoin(self, resume: Callable[[], Awaitable[bool]], *reasons: str) -> bool:
        """Let ``resume()`` bring the engine back, and drop these reasons if it returns True.

        Without any reason left the engine rejoins discovery. ``resume`` is not called if none of these reasons holds;
        while it runs, :attr:`reasons` are the old ones.

        :returns: whether the engine serves now.
        """
        async with self._lock:
            if self._reasons.intersection(reasons) and await resume():
                left = self._reasons.difference(reasons)
                if not left:
                    await self._rejoin()
                self._reasons = left
            return not self._reasons

    async def withdrawn_for(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Stay out of discovery while ``work()`` runs, and return what it returns; nothing else changes meanwhile."""
        async with self._lock:
            if self._reasons:
                return await work()
            try:
                await self._leave()
                return await work()
            finally:
                await self._rejoin()

    async def _leave(self) -> None:
        self.withdrawn = True
        await self._discovery.withdraw()

    async def _rejoin(self) -> None:
        await self._discovery.rejoin()
        self.withdrawn = False


class EngineControl:
    """All operations of one engine: its own, and those on its LoRA adapters.

    :ivar lora: the LoRA adapters; None if there can be none.
    :ivar gate: how the engine leaves discovery and rejoins it.
    """

    def __init__(
        self,
        context: EngineContext,
        routes: Mapping[str, Operation],
        endpoints: Mapping[str, Operation],
        lora: LoraAdapters | None = None,
    ) -> None:
        """Remember the engine's own operations.

        :param routes: those that are control routes, by name.
        :param endpoints: those that Dynamo's own tools reach as endpoints, by the names that they use.
        """
        self._routes = routes
        self._endpoints = endpoints
        self.lora = lora
        self.gate = DiscoveryGate(context.discovery)

    @contextlib.contextmanager
    def adapter(self, request: Mapping[str, Any]) -> Iterator[LoraAdapter | None]:
        """Keep the LoRA adapter that a request is for loaded until the block ends; None is the model itself.

        :raises InvalidRequestError: there is neither a model nor an adapter of this name.
        """
        if self.lora is None:
            yield None
            return
        adapter = self.lora.begin(translation.adapter_name(request))
        try:
            yield adapter
        finally:
            self.lora.end(adapter)

    def paused(self) -> bool:
        """Return whether the engine does not serve on purpose."""
        return self.gate.withdrawn

    def routes(self) -> Mapping[str, Operation]:
        """Return all operations by name."""
        return routes({**self._routes, **self._lora_operations()})

    def endpoints(self) -> list[EndpointSpec]:
        """Return the operations that Dynamo's own tools reach as endpoints."""
        operations = {**self._endpoints, **self._lora_operations()}
        return [endpoint(name, operation) for name, operation in operations.items()]

    def _lora_operations(self) -> dict[str, Operation]:
        return {} if self.lora is None else self.lora.operations()
