"""Operations on an engine while it serves, and how it leaves discovery for a while.

Each operation is a control route ``/engine/NAME`` of the worker's status server. Those that Dynamo's own tools call are
endpoints as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dynamo_worker.engine import EndpointSpec, LargeOperation
from dynamo_worker.errors import InvalidRequestError, for_client
from dynamo_worker.kit import request_metadata
from dynamo_worker.kit.fields import refusal
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from dynamo_worker.engine import Discovery, EngineContext, Operation
    from dynamo_worker.kit.lora import LoraAdapter, LoraAdapters

log = get_logger(__name__)

_T = TypeVar("_T")


def routes(operations: Mapping[str, Operation]) -> dict[str, Operation]:
    """Return the operations as control routes, which answer errors with ``status: error`` and a message."""
    return {name: _answering(name, operation) for name, operation in operations.items()}


def endpoint(name: str, operation: Operation) -> EndpointSpec:
    """Return the endpoint through which Dynamo's own tools call an operation."""
    answer = _answering(name, operation)

    async def generate(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:  # noqa: ARG001
        yield await answer(request)

    return EndpointSpec(name, generate=generate, takes_tokens=False)


def _answering(name: str, operation: Operation) -> Operation:
    async def answer(body: Any) -> dict[str, Any]:
        if body is not None and not isinstance(body, dict):
            return {"status": "error", "message": "expected a JSON object as the body"}
        try:
            return {"status": "success", **await operation(body or {})}
        except Exception as error:
            log.warning("Control operation failed", operation=name, error=error)
            return {"status": "error", "message": for_client(str(error)) or type(error).__name__}

    return LargeOperation(answer, operation.most_body_bytes) if isinstance(operation, LargeOperation) else answer


def profile_routes(
    start: Callable[[dict[str, Any]], Awaitable[object]], stop: Callable[[], Awaitable[object]]
) -> dict[str, Operation]:
    """Return the control routes of a profiler.

    :param start: starts it as the body of ``start_profile`` says.
    :param stop: stops it and writes the profile.
    """

    async def start_profile(body: dict[str, Any]) -> dict[str, Any]:
        await start(body)
        return {"message": "profiling"}

    async def stop_profile(_: dict[str, Any]) -> dict[str, Any]:
        await stop()
        return {"message": "stopped profiling"}

    return {"start_profile": start_profile, "stop_profile": stop_profile}


def regions(body: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """Return the regions of memory that the ``tags`` of a request name; all by default.

    :raises InvalidRequestError: the engine does not know one.
    """
    tags = body.get("tags", list(known))
    if not (isinstance(tags, list) and tags and set(tags) <= set(known)):
        raise refusal("tags", f"a list of {', '.join(known)}", tags)
    return tags


class DiscoveryGate:
    """Keeps an engine out of discovery while it cannot serve.

    Every withdrawal has named reasons. The engine rejoins discovery when none is left.

    :ivar withdrawn: True from just before the engine leaves discovery until it has rejoined.
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
        """Leave discovery for these reasons, then ``pause()`` the engine.

        :attr:`reasons` changes only after ``pause`` has succeeded; if it fails, the engine rejoins.

        :returns: False if all the reasons hold already; then nothing happens.
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
        """``resume()`` the engine, drop these reasons if that returns True, and rejoin discovery if none is left.

        ``resume`` is not called if none of the reasons holds; :attr:`reasons` changes only after it has succeeded.

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
        """Stay out of discovery while ``work()`` runs, and return its result; other changes wait."""
        async with self._lock:
            if self._reasons:
                return await work()
            try:
                await self._leave()
                return await work()
            finally:
                await self._rejoin()

    async def around(
        self, work: Callable[[], Awaitable[_T]], *, leave: bool, reason: str, holds: Callable[[], bool]
    ) -> _T:
        """Run ``work()`` and return its result; other changes wait.

        :param leave: whether the engine is out of discovery meanwhile.
        :param reason: keeps the engine out afterwards if ``holds()``, even if ``work`` has failed; dropped if not.
        """
        async with self._lock:
            try:
                if leave and not self._reasons:
                    await self._leave()
                return await work()
            finally:
                self._reasons = self._reasons.union([reason]) if holds() else self._reasons.difference([reason])
                if self._reasons and not self.withdrawn:
                    await self._leave()
                elif self.withdrawn and not self._reasons:
                    await self._rejoin()

    async def _leave(self) -> None:
        self.withdrawn = True
        await self._discovery.withdraw()

    async def _rejoin(self) -> None:
        await self._discovery.rejoin()
        self.withdrawn = False


class EngineControl:
    """The operations of one engine: its own, and those on its LoRA adapters.

    :ivar lora: the LoRA adapters; None if the engine serves none.
    :ivar gate: through which the engine leaves discovery and rejoins it.
    :ivar allowed_paths: what operations may read and write.
    """

    def __init__(
        self,
        context: EngineContext,
        routes: Mapping[str, Operation],
        endpoints: Mapping[str, Operation],
        lora: LoraAdapters | None = None,
    ) -> None:
        """Take the engine's own operations.

        :param routes: the control routes, by name.
        :param endpoints: the endpoints for Dynamo's own tools, by the tools' names.
        """
        self._routes = routes
        self._endpoints = endpoints
        self.lora = lora
        self.gate = DiscoveryGate(context.discovery)
        self.allowed_paths = context.allowed_paths

    @contextlib.contextmanager
    def lora_adapter(self, request: Mapping[str, Any]) -> Iterator[LoraAdapter | None]:
        """Keep the LoRA adapter of a request loaded until the ``with`` block ends; None for the model itself.

        :raises InvalidRequestError: no model or adapter has the name that the request asks for.
        """
        if self.lora is None:
            yield None
            return
        adapter = self.lora.begin(request_metadata.lora_name(request))
        try:
            yield adapter
        finally:
            self.lora.end(adapter)

    async def output_directory(self, given: object) -> str:
        """Return the directory ``output_dir`` that an operation is to write into.

        :raises InvalidRequestError: it is no directory's name, or operations may not write there.
        """
        if not isinstance(given, str):
            raise refusal("output_dir", "a directory", given)
        return await asyncio.to_thread(self.allowed_paths.to_write, given)

    async def checkpoint(self, given: str) -> str:
        """Return the resolved path, or the URI, of the weights that an operation is to load.

        :raises InvalidRequestError: operations may not load from there, or nothing is there.
        """
        return await asyncio.to_thread(self._checkpoint, given)

    def _checkpoint(self, given: str) -> str:
        path = self.allowed_paths.to_load(given)
        if os.path.isabs(path) and not os.path.exists(path):
            raise InvalidRequestError(f"{path!r:.200} does not exist")
        return path

    def paused(self) -> bool:
        """Return whether an operation has taken the engine out of service."""
        return self.gate.withdrawn

    def routes(self) -> Mapping[str, Operation]:
        """Return all control routes by name."""
        return routes({**self._own_routes(), **self._lora_operations()})

    def endpoints(self) -> list[EndpointSpec]:
        """Return the endpoints for Dynamo's own tools."""
        operations = {**self._endpoints, **self._lora_operations()}
        return [endpoint(name, operation) for name, operation in operations.items()]

    def _own_routes(self) -> Mapping[str, Operation]:
        return self._routes

    def _lora_operations(self) -> dict[str, Operation]:
        return {} if self.lora is None else self.lora.operations()


class MemoryControl(EngineControl, ABC):
    """The operations of an engine that can release its accelerator's memory while it stays up.

    The released regions are reasons for being out of discovery.
    """

    #: The regions of memory that can be released separately.
    REGIONS: ClassVar[tuple[str, ...]]

    @abstractmethod
    async def release_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        """Release regions of memory, after the requests in flight have ended; the engine has left discovery.

        :param tags: the regions, none of which is released already.
        :param body: of the request for the operation.
        """

    @abstractmethod
    async def resume_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        """Allocate released regions of memory again.

        :param body: of the request for the operation.
        """

    async def release_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, end the requests in flight, and release the accelerator's memory, or some ``tags`` of it."""
        tags = regions(body, self.REGIONS)

        async def release() -> None:
            await self.release_memory([tag for tag in tags if tag not in self.gate.reasons], body)

        if not await self.gate.withdraw(release, *tags):
            return {"message": "the memory is already released"}
        log.info("Memory released", tags=",".join(tags))
        return {"message": "memory released"}

    async def resume_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Allocate the released memory, or some ``tags`` of it, again; rejoin discovery once none is released."""
        tags = regions(body, self.REGIONS)
        if not self.gate.reasons.intersection(tags):
            return {"message": "the memory is not released"}

        async def resume() -> bool:
            await self.resume_memory([tag for tag in tags if tag in self.gate.reasons], body)
            return True

        await self.gate.rejoin(resume, *tags)
        released = sorted(self.gate.reasons.intersection(self.REGIONS))
        if released:
            return {"message": f"partly resumed; still released: {released}"}
        log.info("Memory resumed")
        return {"message": "memory resumed"}

    def _own_routes(self) -> Mapping[str, Operation]:
        return {
            "release_memory_occupation": self.release_memory_occupation,
            "resume_memory_occupation": self.resume_memory_occupation,
            **super()._own_routes(),
        }
