"""The loop of an engine in a process of its own: an engine derives from :class:`StepEngine`.

:class:`~dynamo_worker.kit.child_process.ChildProcess` starts the process. Standard library only, so that a process
starts in a tenth of a second.
"""

from __future__ import annotations

import select
import time
import traceback
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import InvalidRequestError, describe, for_client
from dynamo_worker.kit.child_messages import line, message

if TYPE_CHECKING:
    import socket
    from collections.abc import Container

    from dynamo_worker.kit.child_messages import Lines

#: Bytes read at once.
READ_BYTES: Final = 256 * 1024
#: Seconds between two messages that tell nothing but progress.
_PROGRESS_SECONDS: Final = 0.1


class Outbox:
    """Collects what an engine sends, and writes it in few messages.

    :ivar requests: the requests in progress: their numbers by the ids that the engine knows.
    """

    def __init__(self, connection: socket.socket, most_bytes: int) -> None:
        self._connection, self._most_bytes = connection, most_bytes
        self.requests: dict[str, int] = {}
        #: A number before each chunk: a list of pairs would cost more.
        self._chunks: list[Any] = []
        self._ended: list[int] = []
        self._unsendable: list[str] = []

    def open(self, request_id: str, number: int, taken: Container[str] = ()) -> str:
        """Remember a request, and return the id that the engine shall know: two clients may have chosen the same.

        :param taken: further ids that the engine still knows.
        """
        name = request_id
        while name in self.requests or name in taken:
            name += f"#{number}"
        self.requests[name] = number
        return name

    def send(self, request_id: str, chunk: Any, *, last: bool = False) -> None:
        """Collect a chunk; one of a request that has ended or was aborted is dropped."""
        number = self.requests.get(request_id)
        if number is not None:
            self._chunks += (number, chunk)
            if last:
                self.end(request_id)

    def end(self, request_id: str) -> None:
        """End a request."""
        number = self.requests.pop(request_id, None)
        if number is not None:
            self._ended.append(number)

    def fail(self, request_id: str, error: BaseException | str) -> None:
        """End a request with an error."""
        number = self.requests.pop(request_id, None)
        if number is not None:
            self.flush()
            self._fail(number, error)

    def flush(self) -> bool:
        """Write what was collected, and return whether there was anything."""
        if not self._chunks and not self._ended:
            return False
        chunks, self._chunks = self._chunks, []
        ended, self._ended = self._ended, []
        self._write_chunks(chunks, ended)
        return True

    def write(self, message: dict[str, Any]) -> None:
        """Write one message; wait while the worker does not read."""
        self._connection.sendall(line(message))

    def write_answer(self, number: int, value: Any) -> None:
        """Write the answer to a question."""
        try:
            data = line({"answer": number, "value": value})
            if len(data) > self._most_bytes:
                raise ValueError(f"the answer has {len(data)} bytes; at most {self._most_bytes}")
        except (TypeError, ValueError, RecursionError) as error:
            self.write_error(number, error)
        else:
            self._connection.sendall(data)

    def write_error(self, number: int, error: Exception) -> None:
        """Write that a question has no answer, and why."""
        traceback.print_exception(error)
        self.write({"answer": number, "error": for_client(describe(error))})

    def unsendable(self) -> list[str]:
        """Return the requests that have failed since the last call because a chunk could not be written."""
        found, self._unsendable = self._unsendable, []
        return found

    def _write_chunks(self, chunks: list[Any], ended: list[int]) -> None:
        trouble: BaseException | str
        try:
            data = line({"chunks": chunks, "ended": ended})
        except (TypeError, ValueError, RecursionError) as error:
            trouble = f"a chunk cannot be written as JSON: {describe(error)}"
        else:
            if len(data) <= self._most_bytes:
                self._connection.sendall(data)
                return
            trouble = f"a chunk has {len(data)} bytes; at most {self._most_bytes}"
        if len(chunks) > 2:
            half = len(chunks) // 4 * 2
            self._write_chunks(chunks[:half], [])
            self._write_chunks(chunks[half:], ended)
            return
        if chunks:
            number = chunks[0]
            for name in [name for name, other in self.requests.items() if other == number]:
                del self.requests[name]
                self._unsendable.append(name)
            self._fail(number, trouble)
        if ended:
            self.write({"chunks": [], "ended": ended})

    def _fail(self, number: int, error: BaseException | str) -> None:
        refused = isinstance(error, InvalidRequestError)
        if isinstance(error, BaseException) and not refused:
            traceback.print_exception(error)
            error = describe(error)
        self.write({"error": number, "message": for_client(str(error)), "refused": refused})


class StepEngine(ABC):
    """An engine that works in steps, as a scheduler does; all its methods are called in the main thread.

    The loop reads requests between the steps, and steps while there is a request. SIGTERM and the end of the worker
    end it. An exception of :meth:`step`, :meth:`abort`, :meth:`pause` or :meth:`resume` ends the engine.
    """

    _outbox: Outbox

    # ------------------------------------------------------------------------------------------------- what it may call

    def send(self, request_id: str, chunk: Any, *, last: bool = False) -> None:
        """Send a part of an answer; it leaves with the rest of the step's.

        :param chunk: anything that JSON can carry, not to be modified any more.
        :param last: whether the request ends with it.
        """
        self._outbox.send(request_id, chunk, last=last)

    def end(self, request_id: str) -> None:
        """End a request whose last chunk is sent."""
        self._outbox.end(request_id)

    def fail(self, request_id: str, error: BaseException | str) -> None:
        """End one request with an error, :class:`~dynamo_worker.errors.InvalidRequestError` for a client's mistake."""
        self._outbox.fail(request_id, error)

    # ------------------------------------------------------------------------------------------ methods to implement

    def start(self, options: Any) -> Any:  # noqa: ARG002 - for engines
        """Load the model, and return what the worker shall know, anything that JSON can carry.

        An exception ends the start of the worker, which shows its traceback.

        :param options: those of :class:`~dynamo_worker.kit.child_process.ChildProcess`.
        """
        return None

    @abstractmethod
    def add(self, request_id: str, payload: Any) -> None:
        """Begin with a request. An exception ends this request only.

        :param request_id: no request in progress has the same; one that was aborted may have had it. An engine that is
            not done with a request when :meth:`abort` returns has to tell the two apart.
        :raises InvalidRequestError: it is the client's mistake.
        """

    @abstractmethod
    def step(self) -> float | None:
        """Do a piece of work for the requests in progress, and send what has come out.

        :return: seconds until the next step, during which requests and aborts are read; None to go on at once. A step
            that sends nothing counts as progress only if it returns None.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Forget a request; it may have ended. What is sent for it from now on is dropped."""

    def pause(self, request_id: str) -> None:  # noqa: B027 - an engine need not
        """Send nothing more for a request until :meth:`resume`: its client does not keep up.

        An engine need not: the answer then waits in the worker. Beyond a limit for all of them, the longest one fails.
        """

    def resume(self, request_id: str) -> None:  # noqa: B027 - an engine need not
        """Go on with a paused request; it may have ended."""

    def answer(self, question: str, payload: Any) -> Any:  # noqa: ARG002 - for engines
        """Answer a question of the worker (:meth:`~dynamo_worker.kit.child_process.ChildProcess.ask`)."""
        raise LookupError(f"unknown question: {question}")

    def close(self) -> None:  # noqa: B027 - an engine may have nothing to end
        """End the engine's own processes and the like; called once, after a failed start too."""

    # --------------------------------------------------------------------------------------------------------- the loop

    def serve(self, connection: socket.socket, first: dict[str, Any], lines: Lines) -> None:
        """Serve until the worker is gone.

        :param first: the message with the options.
        """
        outbox = self._outbox = Outbox(connection, first["most_bytes"])
        self.send = outbox.send  # type: ignore[method-assign] # called for every token
        outbox.write({"ready": self.start(first["start"])})
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        names: dict[int, str] = {}
        due = told = time.monotonic()
        while True:
            wait = max(0.0, due - time.monotonic()) if outbox.requests else None
            if poll.poll(wait if wait is None else int(wait * 1000 + 0.999)):
                data = connection.recv(READ_BYTES)
                if not data:
                    return
                idle = not outbox.requests
                for text in lines.feed(data):
                    self._handle(message(text), names)
                outbox.flush()
                if idle:
                    due = time.monotonic()
            if not outbox.requests or time.monotonic() < due:
                continue
            pause = self.step()
            now = time.monotonic()
            if outbox.flush():
                told = now
            elif not pause and now - told >= _PROGRESS_SECONDS:
                outbox.write({})
                told = now
            for name in outbox.unsendable():
                self.abort(name)
            due = now + (pause or 0.0)
            if len(names) > 2 * len(outbox.requests) + 64:
                names = {number: name for name, number in outbox.requests.items()}

    def _handle(self, news: dict[str, Any], names: dict[int, str]) -> None:
        outbox = self._outbox
        if "add" in news:
            number = news["add"]
            name = names[number] = outbox.open(news["id"], number)
            try:
                self.add(name, news["payload"])
            except Exception as error:
                outbox.fail(name, error)
        elif "abort" in news:
            name = names.pop(news["abort"], "")
            if outbox.requests.get(name) == news["abort"]:
                del outbox.requests[name]
                self.abort(name)
        elif "pause" in news or "resume" in news:
            number = news["pause"] if "pause" in news else news["resume"]
            name = names.get(number, "")
            if outbox.requests.get(name) == number:
                (self.pause if "pause" in news else self.resume)(name)
        elif "ping" in news:
            outbox.write({"answer": news["ping"], "value": None})
        elif "ask" in news:
            try:
                value = self.answer(news["question"], news["payload"])
            except Exception as error:
                outbox.write_error(news["ask"], error)
            else:
                outbox.write_answer(news["ask"], value)
