"""Aborts on a decode worker, which wait until the request's KV cache has arrived."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import describe
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

log = get_logger(__name__)

#: Seconds that a KV cache gets to arrive. A dead prefill worker usually ends the transfer, and with it the request.
_TRANSFER_SECONDS: Final = 60.0


class DeferredAborts:
    """Makes the aborts of requests that have not begun once they have.

    Until then the prefill worker's KV cache may be on its way: an abort in mid-transfer can end the process of an
    engine whose connector still writes, or take the blocks of the prefill worker with it. The first output shows that
    the transfer is over.
    """

    def __init__(self, run_beside: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Begin without aborts.

        :param run_beside: runs the aborts that wait (:meth:`~dynamo_worker.kit.push_engine.PushEngine.run_beside`);
            the end of the engine cancels them.
        """
        self._run_beside = run_beside

    async def abort(self, request_id: str, begun: asyncio.Event, abort: Callable[[], Awaitable[None]]) -> None:
        """Abort a request; return at once, with the abort still to come, if it has not begun.

        :param begun: set with the request's first output, or with its end.
        :param abort: stops the engine's work for the request, and does nothing for one that has ended.
        """
        if begun.is_set():
            await abort()
        else:
            self._run_beside(self._later(request_id, begun, abort))

    @staticmethod
    async def _later(request_id: str, begun: asyncio.Event, abort: Callable[[], Awaitable[None]]) -> None:
        try:
            await asyncio.wait_for(begun.wait(), _TRANSFER_SECONDS)
        except asyncio.TimeoutError:
            log.warning(
                "The KV cache of an aborted request has not arrived",
                request=request_id,
                waited=_TRANSFER_SECONDS,
                next="it is aborted all the same",
            )
        try:
            await abort()
        except Exception as error:
            log.warning("Abort failed", request_id=request_id, error=describe(error))
