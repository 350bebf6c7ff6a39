"""Requests from the worker to its own engine: the warm-up, and the canary that checks that the engine still works."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

from dynamo_worker.containment import contained
from dynamo_worker.engine import LocalContext
from dynamo_worker.errors import StartError
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from dynamo_worker.engine import Chunk, Engine, Generate, Request, RequestContext
    from dynamo_worker.host.requests.engine_checks import EngineChecks
    from dynamo_worker.host.requests.kinds import RequestKind
    from dynamo_worker.host.requests.serving import RequestRegistry

log = get_logger(__name__)

#: Seconds an engine has to abort a canary request that was cancelled.
_ABORT_SECONDS: Final = 1.0


class Canary:
    """Sends an engine its own canary request."""

    def __init__(self, engine: Engine, make_request: Callable[[], Request], requests: RequestRegistry) -> None:
        """Send requests to ``engine``.

        :param make_request: the engine's ``canary_request``.
        :param requests: counts the chunks of the answers: they are progress.
        """
        self._engine = engine
        self._make_request = make_request
        self._requests = requests

    async def send(self) -> None:
        """Send one request and read its whole answer."""
        await self._ask(self._engine.generate, self._make_request(), lambda _: None)

    async def warm_up(self, checks: EngineChecks, kind: RequestKind, timeout: float) -> None:
        """Send the first request and check its answer; some engines compile kernels for up to 20 s first (measured).

        :param kind: the kind of the engine's requests.
        :param timeout: seconds for the whole answer.
        :raises StartError: it takes longer, or the answer could not be given to a client.
        """
        started = time.monotonic()
        request = checks.canary(self._make_request(), kind.checked)
        answer = kind.first_answer(checks, request)

        def generate(request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
            return checks.stream(self._engine.generate(request, context))

        try:
            await asyncio.wait_for(contained(lambda: self._ask(generate, request, answer.take)), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise StartError(
                f"the engine did not answer its first request within {timeout:g} s",
                hint="see the engine's log output above, or raise --warmup-timeout",
            ) from None
        answer.end()
        log.info("Engine warmed up", seconds=time.monotonic() - started)

    async def _ask(self, generate: Generate, request: Request, take: Callable[[Chunk], None]) -> None:
        request_id = f"canary-{time.monotonic_ns():x}"
        try:
            async for chunk in generate(request, LocalContext(request_id)):
                take(chunk)
                self._requests.chunks += 1
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # the caller gave up on the answer, aborted or not
                await asyncio.wait_for(contained(lambda: self._engine.abort(request_id)), _ABORT_SECONDS)
            raise
