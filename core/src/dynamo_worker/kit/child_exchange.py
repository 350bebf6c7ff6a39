"""What the worker and a process of its engine exchange: requests, their answers, questions, and the news of its end."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

from dynamo_worker.errors import EngineDeadError, InvalidRequestError, describe, shown
from dynamo_worker.kit.child_messages import Lines, line, message

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

#: Bytes of one answer that wait for its client before the engine is asked to pause, and until it may go on.
_PAUSE_BYTES, _RESUME_BYTES = 256 * 1024, 64 * 1024
#: Most bytes of all answers that wait: then the longest of them fails. In memory they take about ten times as much.
_WAITING_BYTES: Final = 64 << 20
#: Bytes that wait for the process before further requests wait in their tasks.
_SEND_BYTES: Final = 1 << 20
#: What a message of a wrong form raises.
_MALFORMED: Final = (ValueError, KeyError, TypeError, AttributeError)


class _Stream:
    """One answer: what its client has not read yet."""

    __slots__ = ("bytes", "chunks", "ended", "error", "name", "number", "paused", "wake")

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.chunks: deque[Any] = deque()
        #: What the chunks take as JSON; each counts for its share.
        self.bytes = 0
        self.ended = self.paused = False
        self.error: BaseException | None = None
        self.wake: asyncio.Future[None] | None = None

    def end(self, error: BaseException | None = None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
            self.notify()

    def notify(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


class Exchange(asyncio.Protocol):
    """The requests and questions that are in the process, and the connection that carries them.

    :ivar info: what the engine has told when it was ready.
    :ivar failure: the traceback with which the engine has failed; empty if it has told none.
    :ivar dead: why the process serves nothing; empty while it serves.
    :ivar closed: whether the connection has ended.
    """

    def __init__(self, name: str, most_bytes: int, on_end: Callable[[], object]) -> None:
        """Begin without a connection.

        :param name: the engine's name in messages.
        :param most_bytes: length limit of one message from the process.
        :param on_end: called at the end of the connection.
        """
        self.name = name
        self.info: Any = None
        self.failure = ""
        self.dead = "it is not started"
        self.closed = self._over = False
        self._on_end = on_end
        self._lines = Lines(most_bytes)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._ready: asyncio.Future[None] | None = None
        #: Answers whose generators have not ended, by their numbers and by their ids.
        self._streams: dict[int, _Stream] = {}
        self._named: dict[str, set[_Stream]] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._numbers = self._waiting = 0
        self._steps = 0

    # -------------------------------------------------------------------------------------------------- its two callers

    async def begin(self, first: dict[str, Any]) -> None:
        """Send the first message, and wait until the engine is ready.

        :raises EngineDeadError: it will not be.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._tell(first)
        if self._over:
            raise self._error()
        await self._ready

    async def generate(self, request_id: str, payload: Any) -> AsyncGenerator[Any, None]:
        """Hand over a request and yield the chunks of its answer."""
        await self._room()
        self._numbers += 1
        stream = _Stream(self._numbers, request_id)
        self._tell({"add": stream.number, "id": request_id, "payload": payload})
        self._streams[stream.number] = stream
        self._named.setdefault(request_id, set()).add(stream)
        chunks, create_future = stream.chunks, asyncio.get_running_loop().create_future
        try:
            while True:
                while chunks:
                    size = stream.bytes // len(chunks)
                    chunk = chunks.popleft()
                    stream.bytes -= size
                    self._waiting -= size
                    if stream.paused and stream.bytes <= _RESUME_BYTES:
                        stream.paused = False
                        self._tell({"resume": stream.number})
                    yield chunk
                if stream.ended:
                    if stream.error is not None:
                        raise stream.error
                    return
                stream.wake = create_future()
                await stream.wake
        finally:
            self._forget(stream)

    def abort(self, request_id: str) -> None:
        """End the requests with an id."""
        for stream in list(self._named.get(request_id, ())):
            self._fail(stream, asyncio.CancelledError(f"{self.name} was told to abort it"))

    async def asked(self, kind: str, content: dict[str, Any]) -> Any:
        """Send a question and return its answer."""
        await self._room()
        self._numbers += 1
        number = self._numbers
        future = self._questions[number] = asyncio.get_running_loop().create_future()
        try:
            self._tell({kind: number, **content})
            return await future
        finally:
            del self._questions[number]

    def check(self) -> None:
        """Return if the process serves.

        :raises EngineDeadError: it does not.
        """
        if self.dead:
            raise self._error()

    def progress(self) -> int:
        """Return the number of steps that the engine has reported."""
        return self._steps

    def lost(self, reason: str) -> None:
        """End everything that waits for the process; the first reason counts."""
        if self._over:
            return
        self._over, self.dead = True, reason
        for stream in self._streams.values():
            stream.end(self._error())
        for future in (*self._questions.values(), *([self._ready] if self._ready else [])):
            if not future.done():
                future.set_exception(self._error())
        self._writable.set()

    def close(self) -> None:
        """Close the connection, whatever still waits for the process."""
        if self._transport is not None:
            self._transport.abort()

    # ----------------------------------------------------------------------------------------------- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection."""
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(_SEND_BYTES)
        self._writable.set()

    def pause_writing(self) -> None:
        """Let further requests wait."""
        if not self._over:
            self._writable.clear()

    def resume_writing(self) -> None:
        """Let the requests go on that wait."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Take what the process has sent; something else than messages ends the connection."""
        text = b""
        try:
            for text in self._lines.feed(data):
                self._take(message(text), len(text))
        except _MALFORMED as error:
            what = f"something that is no message: {shown(text)} ({describe(error)})" if text else error
            self.lost(f"its process has sent {what}")
            self.close()

    def eof_received(self) -> None:
        """Take the end of what the process sends, even if it does not read what waits for it."""
        self.close()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - the exit status tells more
        """Take the end of the connection."""
        self.closed = True
        self._on_end()

    # --------------------------------------------------------------------------------------------------------- messages

    def _take(self, news: dict[str, Any], size: int) -> None:
        if "chunks" in news:
            self._steps += 1
            if len(news["chunks"]) % 2:
                raise ValueError("a chunk without its request")
            self._take_chunks(news["chunks"], news["ended"], size)
        elif "answer" in news:
            question = self._questions.get(news["answer"])
            if question is not None and not question.done():
                if "error" in news:
                    question.set_exception(RuntimeError(f"{self.name}: {news['error']}"))
                else:
                    question.set_result(news.get("value"))
        elif "error" in news:
            text = str(news["message"])
            stream = self._streams.get(news["error"])
            if stream is not None:
                stream.end(InvalidRequestError(text) if news.get("refused") else RuntimeError(f"{self.name}: {text}"))
        elif "ready" in news:
            if self._ready is not None and not self._ready.done():
                self.dead, self.info = "", news["ready"]
                self._ready.set_result(None)
        elif "failed" in news:
            self.failure = str(news["failed"])
            self.lost(f"its process has failed: {self.failure.rpartition(chr(10))[2]}")
        elif not news:
            self._steps += 1

    def _take_chunks(self, chunks: list[Any], ended: list[int], size: int) -> None:
        share, find = 2 * size // (len(chunks) or 1), self._streams.get
        pairs = iter(chunks)
        for number in pairs:
            chunk, stream = next(pairs), find(number)
            if stream is None or stream.ended:
                continue
            stream.chunks.append(chunk)
            stream.bytes += share
            self._waiting += share
            if stream.wake is not None and not stream.wake.done():
                stream.wake.set_result(None)
            if stream.bytes > _PAUSE_BYTES and not stream.paused:
                stream.paused = True
                self._tell({"pause": number})
        for number in ended:
            stream = self._streams.get(number)
            if stream is not None:
                stream.end()
        while self._waiting > _WAITING_BYTES:
            longest = max(self._streams.values(), key=lambda one: one.bytes)
            what = f"{longest.bytes >> 20} MiB of its answer wait"
            self._fail(longest, RuntimeError(f"{self.name}: the client reads too slowly: {what}"))

    def _fail(self, stream: _Stream, error: BaseException) -> None:
        """End an answer with an error; what its client has not read is lost."""
        if not stream.ended:
            self._tell({"abort": stream.number})
        stream.chunks.clear()
        self._waiting -= stream.bytes
        stream.bytes = 0
        stream.ended, stream.error = True, error
        stream.notify()

    def _forget(self, stream: _Stream) -> None:
        """Forget an answer whose generator ends, and abort its request if that has not ended."""
        del self._streams[stream.number]
        others = self._named[stream.name]
        others.discard(stream)
        if not others:
            del self._named[stream.name]
        self._waiting -= stream.bytes
        if not stream.ended:
            self._tell({"abort": stream.number})

    async def _room(self) -> None:
        """Wait until the process takes more.

        :raises EngineDeadError: it serves nothing.
        """
        while not self.dead and not self._writable.is_set():
            await self._writable.wait()
        self.check()

    def _tell(self, news: dict[str, Any]) -> None:
        """Send a message. Only what waits for room may be long or frequent."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(line(news))

    def _error(self) -> EngineDeadError:
        return EngineDeadError(f"{self.name}: {self.dead}")
