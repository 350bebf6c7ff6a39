"""Sends chunks to clients without blocking the event loop: a client that does not read delays only itself.

The runtime's ``send`` blocks its caller while a consumer is behind: after 128 frames in the runtime, and megabytes in
sockets and in the frontend. It cannot be asked beforehand whether it would block, and a call cannot be cancelled. So:

- The event loop only collects chunks, and hands over all chunks of one of its iterations together.
- One thread, the *carrier*, sends for all streams. Chunks of a stream that wait together leave together, as one frame.
- A send that has not returned after some milliseconds makes its stream *slow*: the thread in that call keeps the
  stream and its queue, and a spare thread becomes the carrier. The order within a stream never changes.
- What waits for a slow stream is limited in size and time; beyond the limit its request is cancelled. The thread stays
  in its call until the frontend releases the stream, which happens when its client leaves or reads. New requests are
  therefore refused while too many streams are slow, cancelled ones included.
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
from typing import TYPE_CHECKING, Final

from dynamo_worker.errors import StartError, WorkerError
from dynamo_worker.host.requests.frames import CHUNK_WEIGHT, joined, units, weight
from dynamo_worker.host.requests.streams import SlowClientError, Stream
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import linux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_worker.engine import Chunk, Send

log = get_logger(__name__)

#: Seconds between checks of the carrier: a send seen in two checks in a row has blocked.
_TICK: Final = 0.01
#: Seconds between checks of slow streams when nothing else needs checking.
_SLOW_TICK: Final = 0.25
#: Seconds between checks of a slow stream for which nothing waits, and after which it returns to the carrier.
_PAUSE: Final = 0.05
_CAUGHT_UP: Final = 1.0
#: Seconds that a stream must be blocked to count as slow: its thread may just have had no processor.
_SLOW_SECONDS: Final = 0.1
#: Most weight waiting for one slow stream, and for all of them: about 40 and 160 MB.
_MOST_WAITING: Final = 1_000_000
_MOST_WAITING_IN_ALL: Final = 4_000_000
#: Number of slow streams from which new requests are refused. Each takes a thread and, in the runtime, up to 128
#: frames: 3 MB with many alternatives.
_MANY_SLOW: Final = 256
#: Seconds for a thread to start, and seconds without a thread to send with after which the worker ends.
_BIRTH_SECONDS: Final = 1.0
_STRANDED_SECONDS: Final = 5.0
_NO_THREADS: Final = "no thread can be started to send with"


class Egress:
    """Sends for all streams of a worker."""

    def __init__(self, on_fatal: Callable[[WorkerError], None], *, slow_client_timeout: float) -> None:
        """Prepare to send; :meth:`start` starts the threads.

        :param on_fatal: called when nothing can be sent any more; must only record the error.
        :param slow_client_timeout: seconds that one send may block before its request is cancelled; 0 for no limit.
        """
        self._on_fatal = on_fatal
        self._timeout = slow_client_timeout
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by start()
        #: What this iteration of the event loop has produced. None in place of a chunk ends its stream.
        self._collected: list[tuple[Stream, Chunk | None]] = []
        self._batches: queue.SimpleQueue[list[tuple[Stream, Chunk | None]]] = queue.SimpleQueue()
        #: Where spare threads wait to become the carrier; None ends them.
        self._calls: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._timer: asyncio.TimerHandle | None = None
        #: Whether the next check is one tick away, and when slow streams are checked again (monotonic).
        self._attentive = False
        self._slow_due = 0.0
        self._seen: tuple[int, Stream | None] = (0, None)
        #: Seconds that the carrier has been blocked without a spare thread (not counting time in which this process did
        #: not run), when a spare was last requested, and whether a failure of that was logged.
        self._stranded = 0.0
        self._asked_at = -math.inf
        self._warned = False
        #: Streams that have chunks and are not slow; for the carrier only.
        self._ready: deque[Stream] = deque()
        #: What to tell the tasks of streams (:meth:`_report`). The next carrier does it if this one is blocked.
        self._done: list[tuple[Stream, bool]] = []
        #: Batches handed over, taken by the carrier, and sent completely.
        self._handed_over = 0
        self._taken = 0
        self._settled = 0
        #: How many sends the carrier has begun, and the stream of the one that it is in.
        self._sends = 0
        self._sending: Stream | None = None
        #: Guards which thread is the carrier, which streams are slow, and what these hold.
        self._lock = threading.Lock()
        self._carrier: object = None
        self._spares = 0
        self._slow: set[Stream] = set()
        self._waiting = 0
        self._stopped = False

    def start(self) -> None:
        """Start the carrier and a spare thread.

        :raises StartError: no thread can be started.
        """
        self.loop = asyncio.get_running_loop()
        try:
            self._add_spare()
            self._add_spare()
        except (RuntimeError, MemoryError) as error:
            raise StartError(f"{_NO_THREADS}: {error}", hint="raise the pids limit or the memory limit") from error
        deadline = time.monotonic() + _BIRTH_SECONDS
        while self._spares < 2:
            if time.monotonic() > deadline:
                raise StartError(_NO_THREADS, hint="raise the memory limit (ulimit -v)")
            time.sleep(0.001)
        with self._lock:
            self._appoint()

    def stop(self) -> None:
        """End all threads that are not blocked in a send."""
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
        :param on_slow: called when the client is given up; must end the request.
        """
        return Stream(self, transmit, on_slow)

    @property
    def slow_streams(self) -> int:
        """How many clients currently do not keep up."""
        return len(self._slow)

    @property
    def refusal(self) -> str | None:
        """Why this worker takes no new requests; None while it does."""
        if len(self._slow) >= _MANY_SLOW:
            return f"{len(self._slow)} clients of this worker do not read what it sends"
        # Earlier a spare thread may still be starting.
        return "this worker has no thread to send with" if self._stranded >= _BIRTH_SECONDS else None

    def collect(self, stream: Stream, chunk: Chunk | None) -> None:
        """Take one chunk, or None at the end of a stream, and hand it over with the others of this iteration."""
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
            self._check_after(_TICK)

    def _check(self) -> None:
        """Check whether the carrier is blocked, and whether a slow stream has waited for too long."""
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
            self._check_slow(now)
        busy = self._sending is not None or self._settled != self._handed_over
        if busy or self._slow:
            self._check_after(_TICK if busy else _SLOW_TICK)
        else:
            self._stranded = 0.0

    def _check_after(self, seconds: float) -> None:
        self._attentive = seconds == _TICK
        if self._timer is not None:
            self._timer.cancel()
        if not self._stopped:
            self._timer = self.loop.call_later(seconds, self._check)

    def _replace_carrier(self, stream: Stream) -> None:
        """Leave a stream to the thread that it blocks, and make a spare thread the carrier."""
        if not self._spares:
            self._ask_for_spare()
            return
        with self._lock:
            if self._sending is not stream:  # it has just returned
                return
            self._slow.add(stream)
            stream.slow = True
            stream.blocked_since = time.monotonic() - _TICK
            for chunk in stream.chunks:
                self._weigh(stream, weight(chunk))
            self._appoint()
        if not self._spares:
            with contextlib.suppress(RuntimeError, MemoryError):  # tried again when one is needed
                self._add_spare()

    def _ask_for_spare(self) -> None:
        """Start a thread to replace a blocked carrier; the next check finds it."""
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
        """Start a thread, which reports by itself that it runs.

        Not with ``threading.Thread``: its ``start`` waits forever for a thread that dies at birth for lack of memory.
        """
        _thread.start_new_thread(self._work, ())
        self._asked_at = time.monotonic()

    def _appoint(self) -> None:
        """Make a spare thread the carrier. The caller holds the lock."""
        self._spares -= 1
        self._sending = None
        self._carrier = token = object()
        self._calls.put(token)

    def _check_slow(self, now: float) -> None:
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
            self._give_up(stream, "too much data waits for clients that do not read, most of it for this one")

    def _give_up(self, stream: Stream, why: str) -> None:
        if stream.error is None:
            self.fail(stream, SlowClientError(why))
            stream.on_slow()

    def _work(self) -> None:
        """Run a thread: spare, then the carrier, then the keeper of the stream that blocked it, then spare again."""
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
        """Send for all streams until a send blocks for so long that another thread becomes the carrier.

        :returns: the stream that this thread has to keep; None at the end of the worker.
        """
        batches, ready = self._batches, self._ready
        while not self._stopped:
            if self._done:
                done, self._done = self._done, []
                self._report(done)
            if not ready:
                self._settled = self._taken
                self._take(batches.get())
            while not batches.empty():  # chunks that wait together leave together
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

        It polls: if every chunk woke a thread, the event loop would wait for its turn behind the threads of all slow
        streams, and megabytes are buffered between this client and us anyway.
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
                    self._weigh(stream, -weight(chunk) - CHUNK_WEIGHT * (count - 1))
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
        """Distribute a batch to its streams."""
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
                self._call(self._give_up, stream, "too much data waits for the client")

    def _drop(self, stream: Stream) -> None:
        self._weigh(stream, -stream.waiting)
        stream.chunks.clear()

    def _weigh(self, stream: Stream, change: int) -> None:
        stream.waiting += change
        self._waiting += change

    def _report(self, streams: Sequence[tuple[Stream, bool]]) -> None:
        """Tell the tasks of streams that there is room again, or that nothing is left to be sent."""
        for stream, _ in streams:
            stream.wants_room = False
        self._call(_wake, streams)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(function, *arguments)


def _next(stream: Stream) -> tuple[Chunk, int]:
    """Take the next frame from a stream; return it, and how many chunks it joins."""
    chunk, count = joined(stream.chunks)
    stream.taken += count * units(chunk)
    return chunk, count


def _try(transmit: Send, chunk: Chunk) -> BaseException | None:
    try:
        transmit(chunk)
    except BaseException as error:  # whatever the runtime raises, even a panic, ends this stream only
        return error
    return None


def _wake(streams: Iterable[tuple[Stream, bool]]) -> None:
    for stream, flushed in streams:
        stream.wake(flushed=flushed)
