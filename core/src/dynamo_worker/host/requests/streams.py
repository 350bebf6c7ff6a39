"""The stream of one request's chunks, as the event loop sees it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from dynamo_worker.host.requests.frames import units

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from dynamo_worker.engine import Chunk, Send

#: Most units of one stream that may be in transit before an engine that yields its chunks is paused.
_ROOM: Final = 256


class SlowClientError(RuntimeError):
    """The client has not read for too long, or too much waits for it."""


class Sender(Protocol):
    """The receiver of a stream's chunks: the egress of the worker."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the requests."""

    def collect(self, stream: Stream, chunk: Chunk | None, /) -> None:
        """Take one chunk, or None at the end of the stream."""

    def fail(self, stream: Stream, error: BaseException, /) -> None:
        """Send nothing more of the stream."""


class Stream:
    """One request's chunks on their way to its client.

    The event loop calls the methods; the attributes belong to the sender and its threads.
    """

    __slots__ = (
        "_flushed",
        "_room",
        "_sender",
        "blocked_since",
        "chunks",
        "ended",
        "error",
        "given",
        "on_slow",
        "slow",
        "taken",
        "transmit",
        "waiting",
        "wants_room",
    )

    def __init__(self, sender: Sender, transmit: Send, on_slow: Callable[[], object]) -> None:
        self._sender = sender
        self._flushed: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self.transmit = transmit
        self.on_slow = on_slow
        #: Units (:func:`.frames.units`) handed over by the event loop, and those of them that have left the queue.
        self.given = 0
        self.taken = 0
        self.wants_room = False
        #: The chunks that wait for the thread that sends them.
        self.chunks: deque[Chunk] = deque()
        #: Whether the waiting chunks are the last ones.
        self.ended = False
        #: The error that ended the stream; nothing is sent after it.
        self.error: BaseException | None = None
        #: Whether a thread serves this stream alone because its client does not keep up.
        self.slow = False
        #: Of a slow stream: when its current send began (monotonic); None between sends.
        self.blocked_since: float | None = None
        #: Of a slow stream: the weight of the waiting chunks.
        self.waiting = 0

    def send(self, chunk: Chunk) -> None:
        """Hand over one chunk, which must not be changed afterwards.

        :raises SlowClientError: the client does not read.
        :raises Exception: the error of an earlier send: RuntimeError if the client is gone, ValueError if the chunk
            could not be encoded.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)  # otherwise it grows with every chunk
        self.given += units(chunk)
        self._sender.collect(self, chunk)

    @property
    def full(self) -> bool:
        """Whether an engine that can pause should wait for :meth:`room`."""
        return self.given - self.taken > _ROOM

    async def room(self) -> None:
        """Wait until there is room for more chunks; raises as :meth:`send` does."""
        while self.full and self.error is None:
            self._room = self._sender.loop.create_future()
            self.wants_room = True
            if self.full:  # otherwise the thread may have missed `wants_room`
                await self._room
        if self.error is not None:
            raise self.error

    async def flush(self) -> None:
        """Wait until everything is sent; hand over nothing afterwards. Raises as :meth:`send` does."""
        if self.error is not None:
            raise self.error
        self._flushed = self._sender.loop.create_future()
        self._sender.collect(self, None)
        await self._flushed
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Drop the waiting chunks: the request has ended early."""
        self._sender.fail(self, RuntimeError("the request has ended"))

    def wake(self, *, flushed: bool) -> None:
        """Wake the request's task.

        :param flushed: whether nothing is left to be sent.
        """
        for future in (self._room, self._flushed if flushed else None):
            if future is not None and not future.done():
                future.set_result(None)
