"""The client's side of an answer that an engine pushes: where it stands, and how it ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_worker.engine import Send


class Answer:
    """One request's answer, for engines that report outputs by calling back. Create it on the event loop.

    :ivar begun: set with the first output, or with the end.
    """

    def __init__(self, send: Send) -> None:
        """Start an answer.

        :param send: takes its chunks.
        """
        self.send = send
        self.begun = asyncio.Event()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Retrieve the error, or the event loop logs that of a request whose task was cancelled.
        self._done.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def over(self) -> bool:
        """Whether nothing more may be sent: the answer is complete or has failed, or nobody waits for it."""
        return self._done.done()

    async def wait(self) -> None:
        """Wait for the end.

        :raises Exception: what :meth:`fail` was called with.
        """
        await self._done

    def complete(self) -> None:
        """End the answer: the last chunk is sent."""
        self.begun.set()
        if not self._done.done():
            self._done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the answer with an error."""
        self.begun.set()
        if not self._done.done():
            self._done.set_exception(error)
