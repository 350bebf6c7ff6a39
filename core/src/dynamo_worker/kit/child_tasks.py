"""The loop of an engine in a process of its own that answers each request in a coroutine: see :class:`TaskEngine`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit.child_loop import READ_BYTES, Outbox
from dynamo_worker.kit.child_messages import message

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable

    from dynamo_worker.kit.child_messages import Lines

#: Chunks that wait in one turn of the event loop before their senders let others run: an engine may never wait itself.
_MOST_WAITING: Final = 64


class TaskEngine(ABC):
    """An engine with an asynchronous interface; all its methods are called on one event loop, in the main thread.

    A request that is aborted has its :meth:`generate` cancelled, and one whose client does not keep up waits in its
    ``yield``. SIGTERM and the end of the worker cancel all of them.
    """

    # ------------------------------------------------------------------------------------------ methods to implement

    async def start(self, options: Any) -> Any:  # noqa: ARG002 - for engines
        """Load the model, and return what the worker shall know, anything that JSON can carry.

        An exception ends the start of the worker, which shows its traceback.

        :param options: those of :class:`~dynamo_worker.kit.child_process.ChildProcess`.
        """
        return None

    @abstractmethod
    def generate(self, request_id: str, payload: Any) -> AsyncIterator[Any]:
        """Yield the chunks of one answer, anything that JSON can carry. An exception ends this request only.

        :param request_id: no other generator that has not ended has the same, aborted or not.
        :raises InvalidRequestError: it is the client's mistake.
        """

    async def answer(self, question: str, payload: Any) -> Any:  # noqa: ARG002 - for engines
        """Answer a question of the worker (:meth:`~dynamo_worker.kit.child_process.ChildProcess.ask`)."""
        raise LookupError(f"unknown question: {question}")

    def close(self) -> None:  # noqa: B027 - an engine may have nothing to end
        """End the engine's own processes and the like, after the event loop; called once, after a failed start too."""

    # --------------------------------------------------------------------------------------------------------- the loop

    def serve(self, connection: socket.socket, first: dict[str, Any], lines: Lines) -> None:
        """Serve until the worker is gone.

        :param first: the message with the options.
        """
        asyncio.run(_Server(self, connection, first, lines).run())


class _Request:
    """One request in progress."""

    def __init__(self, number: int, name: str, payload: Any) -> None:
        self.number, self.name, self.payload = number, name, payload
        self.aborted = False
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        self.aborted = True
        if self.task is not None:
            self.task.cancel()


class _Server:
    """Reads messages as they come, and writes at once what all requests have sent in one turn of the event loop."""

    def __init__(self, engine: TaskEngine, connection: socket.socket, first: dict[str, Any], lines: Lines) -> None:
        self._engine, self._connection, self._options, self._lines = engine, connection, first["start"], lines
        self._outbox = Outbox(connection, first["most_bytes"])
        self._requests: dict[int, _Request] = {}
        #: The ids that the engine may still use: an aborted request ends later, in its own time.
        self._names: set[str] = set()
        self._questions: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._over: asyncio.Future[None] | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._over = loop.create_future()
        self._outbox.write({"ready": await self._engine.start(self._options)})
        # Until here SIGTERM interrupts whatever blocks; from here on it lets the requests end in order.
        loop.add_signal_handler(signal.SIGTERM, self._end)
        loop.add_reader(self._connection, self._guarded, self._read)
        try:
            await self._over
        finally:
            loop.remove_reader(self._connection)

    def _end(self, error: Exception | None = None) -> None:
        assert self._over is not None
        if self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)

    def _guarded(self, function: Callable[[], object]) -> None:
        """Call a function whose error is the end of the engine."""
        try:
            function()
        except Exception as error:
            self._end(error)

    def _read(self) -> None:
        data = self._connection.recv(READ_BYTES)
        if not data:
            self._end()
        for text in self._lines.feed(data):
            self._handle(message(text))

    def _handle(self, news: dict[str, Any]) -> None:
        if "add" in news:
            number = news["add"]
            request = _Request(number, self._outbox.open(news["id"], number, self._names), news["payload"])
            self._requests[number] = request
            self._names.add(request.name)
            request.task = asyncio.ensure_future(self._serve(request))
            # Not at the end of the coroutine: one that is cancelled before it begins never gets there.
            request.task.add_done_callback(partial(self._forget, request))
        elif "abort" in news:
            aborted = self._requests.get(news["abort"])
            if aborted is not None and not aborted.aborted:
                self._outbox.requests.pop(aborted.name, None)
                aborted.abort()
        elif "pause" in news or "resume" in news:
            slow = self._requests.get(news["pause"] if "pause" in news else news["resume"])
            if slow is not None:
                (slow.may_send.clear if "pause" in news else slow.may_send.set)()
        elif "ping" in news:
            self._outbox.write({"answer": news["ping"], "value": None})
        elif "ask" in news:
            task = asyncio.ensure_future(self._answer(news["ask"], news["question"], news["payload"]))
            self._questions.add(task)
            task.add_done_callback(self._questions.discard)

    async def _answer(self, number: int, question: str, payload: Any) -> None:
        try:
            value = await self._engine.answer(question, payload)
        except Exception as error:
            self._guarded(partial(self._outbox.write_error, number, error))
        else:
            self._guarded(partial(self._outbox.write_answer, number, value))

    async def _serve(self, request: _Request) -> None:
        outbox, name = self._outbox, request.name
        try:
            async with contextlib.AsyncExitStack() as stack:
                chunks = self._engine.generate(name, request.payload)
                if isinstance(chunks, AsyncGenerator):
                    stack.push_async_callback(chunks.aclose)
                async for chunk in chunks:
                    if request.aborted:  # it has swallowed its cancellation
                        return
                    outbox.send(name, chunk)
                    if self._flush_soon():
                        await asyncio.sleep(0)
                    await request.may_send.wait()
            if not request.aborted:
                outbox.end(name)
                self._flush_soon()
        except Exception as error:
            if not request.aborted:
                self._guarded(partial(outbox.fail, name, error))

    def _forget(self, request: _Request, _: asyncio.Task[None]) -> None:
        del self._requests[request.number]
        self._names.discard(request.name)

    def _flush_soon(self) -> bool:
        """Have written what is sent, and return whether much waits: its sender then lets others run."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._guarded, self._flush)
        self._waiting += 1
        return self._waiting >= _MOST_WAITING

    def _flush(self) -> None:
        self._waiting = 0
        self._outbox.flush()
        unsendable = set(self._outbox.unsendable())
        if unsendable:
            for request in self._requests.values():
                if request.name in unsendable:
                    request.abort()
