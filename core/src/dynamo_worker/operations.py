"""Operations on an engine while it serves: what their routes and endpoints have in common.

Each is a control route ``/engine/NAME`` of the worker's status server; those that Dynamo's own tools know are served
as endpoints too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from dynamo_worker.engine import EndpointSpec
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dynamo.runtime import Endpoint

log = get_logger(__name__)

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
            return {"status": "error", "message": str(error) or type(error).__name__}

    return answer


class Presence:
    """Whether routers may send requests: an engine that cannot serve for a while steps out of discovery."""

    def __init__(self) -> None:
        self._endpoint: Endpoint | None = None
        self._lock = asyncio.Lock()
        #: Whether the engine has stepped out.
        self.away = False

    def attach(self, endpoint: Endpoint) -> None:
        """Remember the endpoint that steps out."""
        self._endpoint = endpoint

    async def step_out(self, pause: Callable[[], Awaitable[object]]) -> bool:
        """Leave discovery, then ``pause()`` the engine; return False if it was away already.

        If ``pause`` fails the engine is taken to serve as before.
        """
        async with self._lock:
            if self.away:
                return False
            if self._endpoint is not None:
                await self._endpoint.unregister_endpoint_instance()
            try:
                await pause()
            except BaseException:
                await self._enter()
                raise
            self.away = True
            return True

    async def step_in(self, resume: Callable[[], Awaitable[bool]]) -> bool:
        """Let ``resume()`` bring the engine back, and enter discovery if it says that all of it is back.

        :returns: whether the engine serves now.
        """
        async with self._lock:
            if self.away and await resume():
                await self._enter()
                self.away = False
            return not self.away

    async def _enter(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.register_endpoint_instance()
