"""Sends chunks to clients without ever holding up the event loop: a client that does not read holds up only itself.

The runtime's ``send`` blocks its caller while a consumer is behind: 128 frames in the runtime, and megabytes in sockets
and in the frontend. There is no way to ask it beforehand, and none to take a call back. So:

- The event loop only collects. What one of its iterations has made is handed over together.
- One thread, the *carrier*, sends for all streams. Chunks of a stream that wait together leave together, as one frame.
- A send that has not returned after some milliseconds makes its stream a *slow* one: the thread in that call keeps the
  stream, with a queue of its own, and a spare thread becomes the carrier. The order within a stream never changes.
- What waits for a slow stream is bounded in size and in time; beyond that its request is cancelled. The thread stays in
  its call until the frontend lets go of the stream, which it does when its client leaves or reads. So new requests are
  refused while too many streams are slow, those given up among them.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import StartError, WorkerError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import linux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_worker.engine import Chunk, Send

log = get_logger(__name__)

#: Seconds between two looks at the carrier: a send found in two of them in a row has blocked.
_TICK: Final = 0.01
#: Seconds between two looks at slow streams when there is nothing else to look at.
_SLOW_TICK: Final = 0.25
#: Seconds between two looks at a slow stream for which nothing waits, and after which it goes back to the carrier.
_PAUSE: Final = 0.05
_CAUGHT_UP: Final = 1.0
#: Seconds for which a stream must be held up to be slow: the thread may just not have got a processor.
_SLOW_SECONDS: Final = 0.1
#: Chunks of one stream on their way, beyond which an engine that can wait has to; with alternatives to its tokens one
#: is as much as so many: a dictionary for each alternative, which the garbage collector looks through again and again.
_ROOM: Final = 256
_LISTED_UNITS: Final = 16
#: Most tokens in a frame of several chunks, and most if they come with alternatives: the runtime encodes a frame in
#: one go, with the interpreter locked, and the frontend decodes it so.
_MOST_TOKENS: Final = 256
_MOST_LISTED: Final = 16
#: Weight of what may wait for one slow stream, and for all of them: about 40 and 160 MB.
_MOST_WAITING: Final = 1_000_000
_MOST_WAITING_IN_ALL: Final = 4_000_000
#: Weight of a chunk and of an alternative in its ``top_logprobs``; that of a token is 1. One unit is about 40 bytes.
_CHUNK_WEIGHT: Final = 8
_ALTERNATIVE_WEIGHT: Final = 10
#: Slow streams from which on other workers get new requests. Each takes a thread and, in the runtime, up to 128 frames:
#: 3 MB with many alternatives.
_MANY_SLOW: Final = 256
#: Seconds that a thread has to come up, and without a thread to send with after which the worker ends.
_BIRTH_SECONDS: Final = 1.0
_STRANDED_SECONDS: Final = 5.0
_NO_THREADS: Final = "no thread can be started to send with"

#: What a chunk may hold to be merged with the next one. All but ``index`` are lists with one entry for each token.
_LISTS: Final = ("token_ids", "log_probs", "top_logprobs")
_MERGEABLE: Final = frozenset({*_LISTS, "index"})


class SlowClientError(RuntimeError):
    """The client has not read for too long, or too much is waiting for it."""


def joined(chunks: deque[Chunk]) -> tuple[Chunk, int]:
    """Take from the left of ``chunks`` what one chunk can say; return that one, and how many it stands for."""
    last = chunks.popleft()
    group: list[Any] = [last]
    if chunks and type(last.get("token_ids")) is list:
        room = (_MOST_LISTED if "top_logprobs" in last else _MOST_TOKENS) - len(last["token_ids"])
        while chunks and _continues(last, chunks[0]) and room >= len(chunks[0]["token_ids"]):
            last = chunks.popleft()
            room -= len(last["token_ids"])
            group.append(last)
    if len(group) == 1:
        return last, 1
    whole: Any = dict(last)
    for name in _LISTS:
        if last.get(name) is not None:
            whole[name] = list(chain.from_iterable(chunk[name] for chunk in group))
    return whole, len(group)


def _continues(first: Chunk, second: Chunk) -> bool:
    """Return whether one chunk can say what two of a stream say one after the other.

    The first may hold nothing but tokens and their log-probabilities; the second may end the stream.
    """
    if not first.keys() <= _MERGEABLE or first.get("index") != second.get("index"):
        return False
    if type(second.get("token_ids")) is not list:
        return False
    for name in ("log_probs", "top_logprobs"):
        values, more = first.get(name), second.get(name)
        if (values is not None or more is not None) and not (type(values) is list and type(more) is list):
            return False
    return True


def weight(chunk: Chunk) -> int:
    """Return how much memory a chunk takes, in units of about 40 bytes."""
    tokens, top = chunk.get("token_ids"), chunk.get("top_logprobs")
    alternatives = sum(len(entry) for entry in top if type(entry) is list) if type(top) is list else 0
    return _CHUNK_WEIGHT + _ALTERNATIVE_WEIGHT * alternatives + (len(tokens) if type(tokens) is list else 0)


class Stream:
    """The way of one request's chunks to its client. Its methods are for the event loop, the rest is the egress's."""

    __slots__ = (
        "_egress",
        "_flushed",
        "_room",
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

    def __init__(self, egress: Egress, transmit: Send, on_slow: Callable[[], object]) -> None:
        self._egress = egress
        self._flushed: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self.transmit = transmit
        self.on_slow = on_slow
        #: Units (:func:`_units`) that the event loop has handed over, and those of them that have left the queue.
        self.given = 0
        self.taken = 0
        self.wants_room = False
        #: What waits for the thread that sends it.
        self.chunks: deque[Chunk] = deque()
        #: Nothing comes after what waits.
        self.ended = False
        #: What sending has ended with; nothing is sent after it.
        self.error: BaseException | None = None
        #: A thread keeps it for itself, because its client does not keep up.
        self.slow = False
        #: Of a slow stream: when the send that it is in has begun (monotonic), None if it is in none.
        self.blocked_since: float | None = None
        #: Of a slow stream: the weight of what waits.
        self.waiting = 0

    def send(self, chunk: Chunk) -> None:
        """Hand one chunk over; it must not be changed afterwards.

        :raises SlowClientError: the client does not read.
        :raises Exception: what sending an earlier chunk has ended with: RuntimeError if the client is gone, ValueError
            if the chunk could not be encoded.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)  # else it grows with every chunk
        self.given += _units(chunk)
        self._egress.collect(self, chunk)

    @property
    def full(self) -> bool:
        """Whether an engine that can wait has to (:meth:`room`)."""
        return self.given - self.taken > _ROOM

    async def room(self) -> None:
        """Wait until there is room for more chunks; raises as :meth:`send` does."""
        while self.full and self.error is None:
            self._room = self._egress.loop.create_future()
            self.wants_room = True
            if self.full:  # else the thread has not seen that somebody waits
                await self._room
        if self.error is not None:
            raise self.error

    async def flush(self) -> None:
        """Wait until everything is sent; nothing may be handed over afterwards. Raises as :meth:`send` does."""
        if self.error is not None:
            raise self.error
        self._flushed = self._egress.loop.create_future()
        self._egress.collect(self, None)
        await self._flushed
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Drop what still waits: the request has ended otherwise."""
        self._egress.fail(self, RuntimeError("the request has ended"))

    def wake(self, *, flushed: bool) -> None:
        """Wake the request's task."""
        for future in (self._room, self._flushed if flushed else None):
            if future is not None and not future.done():
                future.set_result(None)


class Egress:
    """Sends for all streams of a worker."""

    def __init__(self, on_fatal: Callable[[WorkerError], None], *, slow_client_timeout: float) -> None:
        """Make it; :meth:`start` starts it.

        :param on_fatal: called when nothing can be sent any more; must only take note.
        :param slow_client_timeout: seconds that one send may block before its request is cancelled; 0 for no limit.
        """
        self._on_fatal = on_fatal
        self._timeout = slow_client_timeout
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by start()
        #: What this iteration of the event loop has made. None in place of a chunk: nothing comes after it.
        self._collected: list[tuple[Stream, Chunk | None]] = []
        self._batches: queue.SimpleQueue[list[tuple[Stream, Chunk | None]]] = queue.SimpleQueue()
        #: Where spare threads wait to be told that they carry from now on; None ends them.
        self._calls: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._timer: asyncio.TimerHandle | None = None
        #: Whether the next look is a tick away, and when slow streams are looked at again (monotonic).
        self._attentive = False
        self._slow_due = 0.0
        self._seen: tuple[int, Stream | None] = (0, None)
        #: Seconds that the carrier has been held up without a spare (time in which this process does not run does not
        #: count), when a spare was last asked for, and whether that was said.
        self._stranded = 0.0
        self._asked_at = -math.inf
        self._warned = False
        #: Streams that have chunks and are not slow; the carrier's own.
        self._ready: deque[Stream] = deque()
        #: What the tasks of streams are to be told (:meth:`_report`). The next carrier tells it if this one is held up.
        self._done: list[tuple[Stream, bool]] = []
        #: Batches that were handed over, that the carrier has taken, and of which it has sent all.
        self._handed_over = 0
        self._taken = 0
        self._settled = 0
        #: How many sends the carrier has begun, and for whom it is in one.
        self._sends = 0
        self._sending: Stream | None = None
        #: Guards who is the carrier, which streams are slow, and what these hold.
        self._lock = threading.Lock()
        self._carrier: object = None
        self._spares = 0
        self._slow: set[Stream] = set()
        self._waiting = 0
        self._stopped = False

    # ------------------------------------------------------------------------------------------- on the event loop

    def start(self) -> None:
        """Start the carrier and a spare thread.

        :raises StartError: the system gives no threads.
        """
        self.loop = asyncio.get_running_loop()
        try:
            self._add_spare()
            self._add_spare()
        except (RuntimeError, MemoryError) as error:
            raise StartError(f"{_NO_THREADS}: {error}", hint="raise the pids limit, or the limit of memory") from error
        deadline = time.monotonic() + _BIRTH_SECONDS
        while self._spares < 2:
            if time.monotonic() > deadline:
                raise StartError(_NO_THREADS, hint="raise the limit of memory (ulimit -v)")
            time.sleep(0.001)
        with self._lock:
            self._appoint()

    def stop(self) -> None:
        """End all threads but those that are in a call."""
        with self._lock:
            self._stopped = True
            spares = self._spares
        if self._timer is not None:
            self._timer.cancel()
        self._batches.put([])
        for _ in range(spares):
            self._calls.put(None)

    def open(self, transmit: Send, on_slow: Callable[[], object]) -> Stream:
        """Return the stream of one request.

        :param transmit: the runtime's function, which may block.
        :param on_slow: called when the client is given up; has to end the request.
        """
        return Stream(self, transmit, on_slow)

    @property
    def slow_streams(self) -> int:
        """How many clients do not keep up at present."""
        return len(self._slow)

    @property
    def refusal(self) -> str | None:
        """Why other workers had better take new requests; None as long as this one can."""
        if len(self._slow) >= _MANY_SLOW:
            return f"{len(self._slow)} clients of this worker do not read what it sends"
        # Before that a spare thread may be on its way.
        return "this worker has no thread to send with" if self._stranded >= _BIRTH_SECONDS else None

    def collect(self, stream: Stream, chunk: Chunk | None) -> None:
        """Take one chunk, or the end of a stream, to hand it over with all others of this iteration."""
        if not self._collected:
            self.loop.call_soon(self._hand_over)
        self._collected.append((stream, chunk))

    def fail(self, stream: Stream, error: BaseException) -> None:
        """Send nothing more of a stream."""
        with self._lock:
            if stream.error is None:
                stream.error = error
            if stream.slow:
                self._drop(stream)

    def _hand_over(self) -> None:
        batch, self._collected = self._collected, []
        self._handed_over += 1
        self._batches.put(batch)
        if not self._attentive:
            self._look_after(_TICK)

    def _look(self) -> None:
        """See whether the carrier is held up, and whether a slow stream has waited for too long."""
        self._attentive = False
        sending = self._sending
        seen, self._seen = self._seen, (self._sends, sending)
        if sending is not None and seen == self._seen:
            self._replace_carrier(sending)
        else:
            self._stranded, self._warned = 0.0, False
        now = time.monotonic()
        if self._slow and now >= self._slow_due:
            self._slow_due = now + _SLOW_TICK
            self._look_at_slow(now)
        busy = self._sending is not None or self._settled != self._handed_over
        if busy or self._slow:
            self._look_after(_TICK if busy else _SLOW_TICK)
        else:
            self._stranded = 0.0

    def _look_after(self, seconds: float) -> None:
        self._attentive = seconds == _TICK
        if self._timer is not None:
            self._timer.cancel()
        if not self._stopped:
            self._timer = self.loop.call_later(seconds, self._look)

    def _replace_carrier(self, stream: Stream) -> None:
        """Leave a stream to the thread that it holds up, and have a spare one carry."""
        if not self._spares:
            self._ask_for_spare()
            return
        with self._lock:
            if self._sending is not stream:  # it has just got through
                return
            self._slow.add(stream)
            stream.slow = True
            stream.blocked_since = time.monotonic() - _TICK
            for chunk in stream.chunks:
                self._weigh(stream, weight(chunk))
            self._appoint()
        if not self._spares:
            with contextlib.suppress(RuntimeError, MemoryError):  # tried again when it is needed
                self._add_spare()

    def _ask_for_spare(self) -> None:
        """Start a thread for a carrier that is held up; the next look finds it."""
        self._stranded += _TICK
        if time.monotonic() - self._asked_at < _BIRTH_SECONDS:
            return
        try:
            self._add_spare()
        except (RuntimeError, MemoryError) as error:  # a limit of the system
            if not self._warned:
                self._warned = True
                log.warning("No thread to send with; clients may have to wait", error=error, slow=len(self._slow))
        if self._stranded >= _STRANDED_SECONDS:
            self._on_fatal(WorkerError(_NO_THREADS))

    def _add_spare(self) -> None:
        """Start a thread, which says by itself that it is there.

        Not with the class of the ``threading`` module: that waits for the thread, without end if it dies at birth for
        want of memory.
        """
        _thread.start_new_thread(self._work, ())
        self._asked_at = time.monotonic()

    def _appoint(self) -> None:
        """Make a spare thread the carrier; the lock is held."""
        self._spares -= 1
        self._sending = None
        self._carrier = token = object()
        self._calls.put(token)

    def _look_at_slow(self, now: float) -> None:
        with self._lock:
            blocked = [
                (stream.blocked_since, stream.waiting, stream)
                for stream in self._slow
                if stream.blocked_since is not None and stream.error is None
            ]
        for since, _, stream in blocked:
            if self._timeout and now - since >= self._timeout:
                self._give_up(stream, f"the client has not read for {now - since:.0f} s")
        for _, _, stream in sorted(blocked, key=lambda entry: entry[1], reverse=True):
            if self._waiting <= _MOST_WAITING_IN_ALL:
                break
            self._give_up(stream, "too much waits for clients that do not read, most of it for this one")

    def _give_up(self, stream: Stream, why: str) -> None:
        if stream.error is None:
            self.fail(stream, SlowClientError(why))
            stream.on_slow()

    # ----------------------------------------------------------------------------------------------- in the threads

    def _work(self) -> None:
        """Be a thread: spare, then the carrier, then the keeper of the stream that held it up, then spare again."""
        linux.set_name("dw-egress")
        with self._lock:
            self._spares += 1
        try:
            while (token := self._calls.get()) is not None:
                stream = self._carry(token)
                if stream is None:
                    return
                self._keep(stream)
                with self._lock:
                    if self._spares or self._stopped:
                        return
                    self._spares += 1
        except BaseException as error:
            log.error("Sending failed", exc_info=error)
            self._call(self._on_fatal, WorkerError(f"sending failed: {type(error).__name__}: {error}"))

    def _carry(self, token: object) -> Stream | None:
        """Be the carrier, until a send has held us up for so long that another thread was made the carrier.

        :returns: the stream that is this thread's to keep; None at the end of the worker.
        """
        batches, ready = self._batches, self._ready
        while not self._stopped:
            if self._done:
                done, self._done = self._done, []
                self._report(done)
            if not ready:
                self._settled = self._taken
                self._take(batches.get())
            while not batches.empty():  # what waits together leaves together
                self._take(batches.get())
            while ready and batches.empty():
                stream = ready.popleft()
                while stream.chunks and stream.error is None:
                    chunk, _ = _next(stream)
                    self._sends += 1
                    self._sending = stream
                    error = _try(stream.transmit, chunk)
                    with self._lock:
                        if error is not None and stream.error is None:
                            stream.error = error
                        if self._carrier is not token:
                            break
                        self._sending = None
                else:
                    if stream.error is not None:
                        stream.chunks.clear()
                    over = stream.ended or stream.error is not None
                    if over or stream.wants_room:
                        self._done.append((stream, over))
                    continue
                return stream
        return None

    def _keep(self, stream: Stream) -> None:
        """Send for a slow stream until it has ended or caught up.

        It is looked at from time to time: waking a thread for every chunk would have the event loop wait for its turn
        behind the threads of all slow streams, and megabytes lie between this client and us anyway.
        """
        assert stream.blocked_since is not None
        held_up = time.monotonic() - stream.blocked_since
        patience = _CAUGHT_UP if held_up >= _SLOW_SECONDS else 0.0
        empty_since = math.inf
        while True:
            with self._lock:
                now = time.monotonic()
                stream.blocked_since = None
                over = stream.error is not None or self._stopped or (stream.ended and not stream.chunks)
                if not stream.chunks:
                    empty_since = min(empty_since, now)
                if over or (not stream.chunks and now - empty_since >= patience):
                    self._slow.discard(stream)
                    self._drop(stream)
                    stream.slow = False
                    break
                chunk = None
                if stream.chunks:
                    chunk, count = _next(stream)
                    self._weigh(stream, -weight(chunk) - _CHUNK_WEIGHT * (count - 1))
                    stream.blocked_since, empty_since = now, math.inf
            if chunk is None:
                if stream.wants_room:
                    self._report([(stream, False)])
                time.sleep(_PAUSE)
                continue
            error = _try(stream.transmit, chunk)
            if error is not None:
                self.fail(stream, error)
        if over or stream.wants_room:
            self._report([(stream, over)])

    def _take(self, batch: Iterable[tuple[Stream, Chunk | None]]) -> None:
        """Give every stream its chunks."""
        self._taken += 1
        with self._lock:
            for stream, chunk in batch:
                if stream.slow:
                    self._take_slow(stream, chunk)
                    continue
                if not stream.chunks:
                    self._ready.append(stream)
                if chunk is None:
                    stream.ended = True
                else:
                    stream.chunks.append(chunk)

    def _take_slow(self, stream: Stream, chunk: Chunk | None) -> None:
        if chunk is None:
            stream.ended = True
        elif stream.error is None:
            stream.chunks.append(chunk)
            self._weigh(stream, weight(chunk))
            if stream.waiting > _MOST_WAITING:
                self._call(self._give_up, stream, "too much waits for the client")

    def _drop(self, stream: Stream) -> None:
        self._weigh(stream, -stream.waiting)
        stream.chunks.clear()

    def _weigh(self, stream: Stream, change: int) -> None:
        stream.waiting += change
        self._waiting += change

    def _report(self, streams: Sequence[tuple[Stream, bool]]) -> None:
        """Tell the tasks of streams that there is room again, or that it is over: nothing is left to be sent."""
        for stream, _ in streams:
            stream.wants_room = False
        self._call(_wake, streams)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self.loop.call_soon_threadsafe(function, *arguments)


def _next(stream: Stream) -> tuple[Chunk, int]:
    """Take from a stream what is sent as one frame; return it, and how many chunks it stands for."""
    chunk, count = joined(stream.chunks)
    stream.taken += count * _units(chunk)
    return chunk, count


def _units(chunk: Chunk) -> int:
    """Return how much of the room of its stream a chunk takes."""
    return 1 if chunk.get("top_logprobs") is None else _LISTED_UNITS


def _try(transmit: Send, chunk: Chunk) -> BaseException | None:
    try:
        transmit(chunk)
    except BaseException as error:  # whatever the runtime raises, a panic among it, ends this stream only
        return error
    return None


def _wake(streams: Iterable[tuple[Stream, bool]]) -> None:
    for stream, flushed in streams:
        stream.wake(flushed=flushed)
