"""Operations on an engine while it serves: what their routes and endpoints have in common.

Each is a control route ``/engine/NAME`` of the worker's status server; those that Dynamo's own tools know are served
as endpoints too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_worker import registration, translation
from dynamo_worker.engine import EndpointSpec
from dynamo_worker.errors import for_client
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from dynamo.runtime import Endpoint

    from dynamo_worker.adapters import Adapter, Adapters
    from dynamo_worker.engine import EngineInfo

log = get_logger(__name__)

_T = TypeVar("_T")

#: Takes the JSON object of a request and returns that of the answer. What it raises is the answer's message.
Operation = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


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


class Presence:
    """Whether routers may send requests: an engine that cannot serve for a while steps out of discovery.

    It does so for a reason, which has a name. It can have several at once, and enters discovery again when it has none.
    """

    def __init__(self) -> None:
        self._endpoint: Endpoint | None = None
        self._lock = asyncio.Lock()
        self._reasons: frozenset[str] = frozenset()
        #: Whether it has left discovery, or is about to; until it is back.
        self.away = False

    @property
    def reasons(self) -> frozenset[str]:
        """Why the engine has stepped out; empty while it serves."""
        return self._reasons

    def attach(self, endpoint: Endpoint) -> None:
        """Remember the endpoint that steps out."""
        self._endpoint = endpoint

    async def step_out(self, pause: Callable[[], Awaitable[object]], *reasons: str) -> bool:
        """Leave discovery for these reasons, then ``pause()`` the engine; return False if it has them all already.

        If ``pause`` fails it is taken to have none of those that are new. Meanwhile :attr:`reasons` are the old ones.
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
                    await self._enter()
                raise
            self._reasons = self._reasons.union(reasons)
            return True

    async def step_in(self, resume: Callable[[], Awaitable[bool]], *reasons: str) -> bool:
        """Let ``resume()`` bring the engine back, and take these reasons for gone if it says so.

        Without any reason left the engine enters discovery. ``resume`` is not called if there is none of these reasons;
        while it runs, :attr:`reasons` are the old ones.

        :returns: whether the engine serves now.
        """
        async with self._lock:
            if self._reasons.intersection(reasons) and await resume():
                left = self._reasons.difference(reasons)
                if not left:
                    await self._enter()
                self._reasons = left
            return not self._reasons

    async def step_aside(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Stay out of discovery while ``work()`` runs, and return what it returns; nobody steps in or out meanwhile."""
        async with self._lock:
            if self._reasons:
                return await work()
            try:
                await self._leave()
                return await work()
            finally:
                await self._enter()

    async def _leave(self) -> None:
        self.away = True
        if self._endpoint is not None:
            async with registration.changing():
                await self._endpoint.unregister_endpoint_instance()

    async def _enter(self) -> None:
        if self._endpoint is not None:
            async with registration.changing():
                await self._endpoint.register_endpoint_instance()
        self.away = False


class Operations:
    """All operations of one engine: its own, and those on its LoRA adapters.

    :ivar adapters: the LoRA adapters; None if there can be none.
    :ivar presence: how the engine steps out of discovery.
    """

    def __init__(
        self, routes: Mapping[str, Operation], endpoints: Mapping[str, Operation], adapters: Adapters | None
    ) -> None:
        """Remember the engine's own operations.

        :param routes: those that are control routes, by name.
        :param endpoints: those that Dynamo's own tools reach as endpoints, by the names that they use.
        """
        self._routes = routes
        self._endpoints = endpoints
        self.adapters = adapters
        self.presence = Presence()

    def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Remember the endpoint that leaves discovery while the engine cannot serve."""
        self.presence.attach(endpoint)
        if self.adapters is not None:
            self.adapters.attach(endpoint, info)

    @contextlib.contextmanager
    def adapter(self, request: Mapping[str, Any]) -> Iterator[Adapter | None]:
        """Keep the LoRA adapter that a request is for loaded until the block ends; None is the model itself.

        :raises InvalidRequestError: there is neither a model nor an adapter of this name.
        """
        if self.adapters is None:
            yield None
            return
        adapter = self.adapters.begin(translation.adapter_name(request))
        try:
            yield adapter
        finally:
            self.adapters.end(adapter)

    def paused(self) -> bool:
        """Return whether the engine does not serve on purpose."""
        return self.presence.away

    def routes(self) -> Mapping[str, Operation]:
        """Return all operations by name."""
        return routes({**self._routes, **(self.adapters.operations() if self.adapters is not None else {})})

    def endpoints(self) -> list[EndpointSpec]:
        """Return the operations that Dynamo's own tools reach as endpoints."""
        own = [endpoint(name, operation) for name, operation in self._endpoints.items()]
        return [*own, *(self.adapters.endpoints() if self.adapters is not None else [])]
