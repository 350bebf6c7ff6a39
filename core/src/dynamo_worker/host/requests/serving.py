"""The request path: from the Dynamo runtime to the engine and back, and the registry of requests in flight."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from dynamo.llm.exceptions import (
    Cancelled,
    Disconnected,
    DynamoException,
    EngineShutdown,
    InvalidArgument,
    Unknown,
    WorkerUnavailable,
)

from dynamo_worker.engine import Chunk, EndpointSpec, Engine, Generate, Push, PushesChunks, Send
from dynamo_worker.errors import EngineDeadError, InvalidRequestError, describe, for_client
from dynamo_worker.host.config.drain_mode import Cut
from dynamo_worker.host.requests.engine_checks import OtherKindError
from dynamo_worker.host.requests.streams import SlowClientError, Stream
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from dynamo.runtime import Context

    from dynamo_worker.host.requests.egress import Egress
    from dynamo_worker.host.requests.kinds import RequestKind

log = get_logger(__name__)


class ResponseSender(Protocol):
    """The Rust object that takes chunks directly, not through the event loop (push egress of Dynamo 1.6)."""

    def send(self, chunk: Chunk, /) -> None:
        """Encode one chunk and queue it for the client. Raises RuntimeError once the stream is closed."""


Handler = Callable[..., AsyncGenerator[Chunk, None]]


class RequestOutcome(str, enum.Enum):
    """How a request ended; the label of ``dynamo_worker_requests_total``."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    HANDED_OFF = "handed_off"
    ABORTED = "aborted"
    REFUSED = "refused"
    INVALID = "invalid"
    FAILED = "failed"
    SLOW_CLIENT = "slow_client"


#: Why a stopping worker refuses and ends requests.
SHUTTING_DOWN: Final = "the worker is shutting down"
#: Seconds for an engine to abort a request.
_ABORT_SECONDS = 10.0
#: Outcomes after which the engine may still be working on the request.
_UNFINISHED = frozenset(
    {
        RequestOutcome.CANCELLED,
        RequestOutcome.HANDED_OFF,
        RequestOutcome.ABORTED,
        RequestOutcome.FAILED,
        RequestOutcome.SLOW_CLIENT,
    }
)


class _InFlight:
    """One request in flight."""

    __slots__ = ("cut", "gone", "graceful", "reason", "request_id", "task")

    def __init__(self, request_id: str, graceful: bool, task: asyncio.Task[Any] | None) -> None:
        self.request_id = request_id
        self.graceful = graceful
        self.task = task
        self.cut: Cut | None = None
        #: Why it is cut, for its client.
        self.reason = ""
        #: Whether the client has disconnected.
        self.gone = False


class RequestRegistry:
    """The requests in flight, for all endpoints of the worker.

    Adding a request, removing one and counting a chunk take constant time.
    """

    def __init__(self) -> None:
        self._entries: set[_InFlight] = set()
        self._refusal: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        #: Whether a frontend can continue a request of this worker on another one.
        self.migrate = True
        #: Chunks sent since the start, for all requests: the cheapest sign of the engine's progress.
        self.chunks = 0
        #: Ended requests by outcome.
        self.outcomes: dict[RequestOutcome, int] = dict.fromkeys(RequestOutcome, 0)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def refusing(self) -> bool:
        """Whether new requests are refused."""
        return self._refusal is not None

    def refuse(self, reason: str) -> None:
        """Refuse new requests from now on, with an error that makes the frontend try another worker."""
        self._refusal = reason

    def accept(self) -> None:
        """Accept new requests again."""
        self._refusal = None

    def admit(self, request_id: str, *, graceful: bool, refusal: str | None = None) -> _InFlight:
        """Register a request that the current task serves.

        :param graceful: the ``graceful_shutdown`` of its endpoint.
        :param refusal: why this worker takes no requests at the moment; None if it does.
        :raises WorkerUnavailable: this worker takes no requests.
        """
        refusal = self._refusal or refusal
        if refusal is not None:
            self.outcomes[RequestOutcome.REFUSED] += 1
            raise WorkerUnavailable(refusal)
        entry = _InFlight(request_id, graceful, asyncio.current_task())
        self._entries.add(entry)
        self._idle.clear()
        return entry

    def release(self, entry: _InFlight, outcome: RequestOutcome) -> None:
        """Remove a request from the registry and count its outcome."""
        self.outcomes[outcome] += 1
        self._entries.discard(entry)
        entry.task = None  # a later cancellation would hit the task's next work
        if not self._entries:
            self._idle.set()

    def cut(self, how: Cut, *, graceful: bool | None = None, reason: str = SHUTTING_DOWN) -> int:
        """End requests in flight and return their number.

        :param how: the error that they end with.
        :param graceful: end only those of endpoints with this ``graceful_shutdown``; None ends all.
        :param reason: why, for their clients.
        """
        return sum(self.cut_one(entry, how, reason) for entry in self._entries if graceful in (None, entry.graceful))

    @staticmethod
    def cut_one(entry: _InFlight, how: Cut, reason: str = "") -> bool:
        """End one request; return False if it is already ending."""
        if entry.cut is not None or entry.task is None:
            return False
        entry.cut, entry.reason = how, reason
        entry.task.cancel()
        return True

    @property
    def counts(self) -> dict[str, int]:
        """Ended requests by outcome, without the outcomes that no request had."""
        return {outcome.value: count for outcome, count in self.outcomes.items() if count}

    def counted(self, send: Send) -> Send:
        """Return a ``send`` that counts every chunk."""

        def count_and_send(chunk: Chunk) -> None:
            self.chunks += 1
            send(chunk)

        return count_and_send

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()


class RequestHandler:
    """Creates the handlers that the Dynamo runtime calls, one for each endpoint."""

    def __init__(
        self,
        engine: Engine,
        registry: RequestRegistry,
        egress: Egress,
        on_dead: Callable[[EngineDeadError], None],
        kind: RequestKind,
    ) -> None:
        """Serve ``engine``.

        :param egress: sends the chunks; already started.
        :param on_dead: called when a request finds the engine dead; must only record the error.
        :param kind: the kind of the engine's requests.
        """
        self._kind = kind
        self._engine = engine
        self._registry = registry
        self._egress = egress
        self._on_dead = on_dead
        self._aborts: set[asyncio.Task[None]] = set()

    def handler(self, endpoint: EndpointSpec) -> Handler:
        """Return the function for ``Endpoint.serve_endpoint``.

        Its parameter ``response_sender`` makes the runtime use push egress: a thread of ``egress.py`` passes chunks
        straight to the Rust encoder, for 5–6 µs a token instead of 30–50 (measured, see docs/design.md). It still is an
        asynchronous generator, because the runtime iterates over whatever it gets, and it yields the chunks itself
        when called without a sender (by in-process clients).
        """
        generate: Generate = endpoint.generate or self._engine.generate
        push: Push | None = None
        if endpoint.generate is None and isinstance(self._engine, PushesChunks):
            push = self._engine.push
        # Chosen here, once: what a kind does not check costs its requests nothing.
        checked: Callable[[Any], Any] | None = None
        if endpoint.takes_tokens:
            checked, generate = self._kind.checked, self._kind.guarded(generate)
            push = None if push is None else self._kind.guarded_push(push)
        registry, egress = self._registry, self._egress
        graceful = endpoint.graceful_shutdown

        async def handle(
            request: Any, context: Context, response_sender: ResponseSender | None = None
        ) -> AsyncGenerator[Chunk, None]:
            refusal = egress.refusal if response_sender is not None and checked is not None else None
            entry = registry.admit(context.id(), graceful=graceful, refusal=refusal)
            outcome = RequestOutcome.FAILED
            out: Stream | None = None
            stream: AsyncIterator[Chunk] | None = None
            gone = context.async_killed_or_stopped()
            gone.add_done_callback(lambda future: self._on_gone(future, entry))
            try:
                if checked is not None:
                    request = checked(request)
                if response_sender is not None:
                    out = egress.open(response_sender.send, lambda: registry.cut_one(entry, Cut.SLOW_CLIENT))
                if push is not None and out is not None:
                    await push(request, context, registry.counted(out.send))
                else:
                    stream = generate(request, context)
                    async for chunk in stream:
                        registry.chunks += 1
                        if out is None:
                            yield chunk
                            continue
                        out.send(chunk)
                        if out.full:
                            await out.room()
                if out is not None:
                    await out.flush()
                outcome = RequestOutcome.COMPLETED
            except BaseException as error:
                # Not only Exception: a panic in Rust code, or SystemExit, which would end the event loop.
                outcome, answer = self._ended(error, entry, context, out)
                # Without its cause: with a CancelledError among the causes the frontend does not migrate.
                raise answer from None
            finally:
                gone.cancel()
                if out is not None and outcome is not RequestOutcome.COMPLETED:
                    out.abandon()
                registry.release(entry, outcome)
                if outcome in _UNFINISHED:
                    self._abandon(entry.request_id, stream)

        return handle

    @staticmethod
    def _on_gone(future: asyncio.Future[bool], entry: _InFlight) -> None:
        if not future.cancelled() and entry.task is not None:
            entry.gone = True
            entry.task.cancel()

    def _ended(
        self, error: BaseException, entry: _InFlight, context: Context, out: Stream | None
    ) -> tuple[RequestOutcome, BaseException]:
        """Classify the end of a request that did not complete; return its outcome and the error for the runtime.

        :param out: the stream to its client; None if the caller iterates over the chunks, and may have stopped.
        """
        names = _names(context)
        if isinstance(error, EngineDeadError):
            self._on_dead(error)
        if entry.cut is Cut.ABORT:
            return RequestOutcome.ABORTED, Cancelled(f"aborted: {entry.reason}")
        if entry.cut is Cut.HANDOFF:
            if not self._kind.migrates:
                return RequestOutcome.ABORTED, EngineShutdown(f"ended: {entry.reason}")
            return RequestOutcome.HANDED_OFF, EngineShutdown(f"handed off: {entry.reason}")
        if out is not None and isinstance(out.error, SlowClientError):
            log.warning("Request cancelled", **names, error=out.error)
            return RequestOutcome.SLOW_CLIENT, Cancelled(f"cancelled: {out.error}")
        if isinstance(error, GeneratorExit) and out is None:
            return RequestOutcome.CANCELLED, error
        if isinstance(error, EngineDeadError):
            outcome = RequestOutcome.HANDED_OFF if self._kind.migrates else RequestOutcome.FAILED
            return outcome, EngineShutdown(str(error))
        if isinstance(error, InvalidRequestError):
            # Of all errors that become HTTP 400, only InvalidArgument keeps its message (measured on 1.6.1); ValueError
            # and HttpError arrive as "Invalid request".
            message = for_client(str(error))
            log.warning("Request refused", **names, error=message)
            return RequestOutcome.INVALID, InvalidArgument(message)
        if isinstance(error, OtherKindError):
            # Another worker of the model can answer it: not the client's fault.
            log.warning("Request refused", **names, error=error)
            return RequestOutcome.REFUSED, WorkerUnavailable(str(error))
        if entry.gone or context.is_stopped():
            # The cancellation of its task, or an error that followed from it; or the RuntimeError that the sender of a
            # closed stream raises.
            return RequestOutcome.CANCELLED, Cancelled("the client has disconnected")
        if isinstance(error, DynamoException):
            log.warning("Request failed", **names, error=error)
            return RequestOutcome.FAILED, error
        log.error("Request failed", **names, exc_info=error)
        if isinstance(error, asyncio.CancelledError):
            # Neither the client nor the worker cancelled it: the engine did, and another one may continue. Of the
            # errors that make a frontend migrate, EngineShutdown would exclude the whole worker for 5 s (measured).
            return RequestOutcome.FAILED, Disconnected("the engine cancelled the request")
        if isinstance(error, (OSError, asyncio.TimeoutError)):
            # A connection broke or timed out: the runtime understands these errors, and the request migrates.
            return RequestOutcome.FAILED, error
        return RequestOutcome.FAILED, Unknown(for_client(describe(error)))

    def _abandon(self, request_id: str, stream: AsyncIterator[Chunk] | None) -> None:
        """Stop the engine's work for a request that ended early, in a separate task."""
        given_up = False

        async def abandon() -> None:
            try:
                try:
                    if isinstance(stream, AsyncGenerator):
                        await stream.aclose()
                finally:
                    await self._engine.abort(request_id)
            except BaseException as error:
                if not given_up:
                    log.warning("Abort failed", request_id=request_id, error=describe(error))

        def give_up() -> None:
            nonlocal given_up
            given_up = True
            log.warning("Abort failed", request_id=request_id, error=f"timed out after {_ABORT_SECONDS:g} s")
            task.cancel()

        def ended(task: asyncio.Task[None]) -> None:
            timer.cancel()
            self._aborts.discard(task)

        task = asyncio.ensure_future(abandon())
        self._aborts.add(task)
        timer = asyncio.get_running_loop().call_later(_ABORT_SECONDS, give_up)
        task.add_done_callback(ended)


def _names(context: Context) -> dict[str, Any]:
    """Return the fields by which a log line names a request: its id, and its trace's id if it is traced."""
    names = {"request_id": context.id()}
    if context.trace_id is not None:
        names["trace_id"] = context.trace_id
    return names
