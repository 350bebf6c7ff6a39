"""Follows workers over time: which there are, what they say, how fast they send, which have gone or restarted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from dynamo_worker.cli.top.status_client import SilentError, look

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_worker.cli.top.samples import Sample
    from dynamo_worker.host.discovery.fleet import FoundWorker

_T = TypeVar("_T")

#: Seconds for one worker to answer.
ANSWER_SECONDS: Final = 2.0
#: Most workers that are asked at once.
_AT_ONCE: Final = 256
#: Seconds between two looks at discovery, at least.
_DISCOVERY_INTERVAL: Final = 2.0
#: Seconds after which a discovery that has not answered counts as silent: a file system may hang.
_DISCOVERY_SECONDS: Final = 10.0
#: Seconds for which a worker that has left is shown.
GONE_SECONDS: Final = 60.0


@dataclass(eq=False)
class WatchedWorker:
    """A worker, and what is known of it.

    :ivar sample: what it said last; None: nothing yet.
    :ivar problem: why it says nothing now; None if it does.
    :ivar chunk_rate: response chunks per second between its last two answers; None until there are two.
    :ivar gone_at: when it left discovery; None if it is there. All times are monotonic.
    :ivar restarted_at: when it was first seen in the place of another one.
    """

    found: FoundWorker
    sample: Sample | None = None
    problem: str | None = None
    chunk_rate: float | None = None
    gone_at: float | None = None
    restarted_at: float | None = None
    _sampled_at: float = 0.0
    _poll: asyncio.Task[None] | None = None

    @property
    def answers(self) -> bool:
        """Whether it says how it is."""
        return self.sample is not None and self.problem is None and self.gone_at is None

    def poll(self, limit: asyncio.Semaphore) -> asyncio.Task[None] | None:
        """Ask it, unless an earlier question is open; return what must end before it has answered."""
        if self.gone_at is not None or self.found.status is None:
            return None
        if self._poll is None or self._poll.done():
            self._poll = asyncio.ensure_future(self._ask(limit))
        return self._poll

    def leave(self, now: float) -> None:
        """Take it for gone."""
        self.gone_at = self.gone_at or now
        self.chunk_rate = None

    async def _ask(self, limit: asyncio.Semaphore) -> None:
        assert self.found.status is not None
        async with limit:
            try:
                sample = await look(self.found.status, ANSWER_SECONDS)
            except SilentError as error:
                self.problem, self.chunk_rate = str(error), None
                return
        if self.found.instance and sample.worker_id and _differ(self.found.instance, sample.worker_id):
            self.problem, self.chunk_rate = f"another worker answers there, {sample.worker_id}", None
            return
        self._learn(sample, time.monotonic())

    def _learn(self, sample: Sample, now: float) -> None:
        before = self.sample
        if before is not None and _restarted(before, sample):  # seen only where discovery does not tell them apart
            self.restarted_at, before = now, None
        self.chunk_rate = None
        if before is not None and before.chunks is not None and sample.chunks is not None and now > self._sampled_at:
            self.chunk_rate = max(0.0, sample.chunks - before.chunks) / (now - self._sampled_at)
        self.sample, self.problem, self._sampled_at = sample, None, now


def _differ(instance: str, worker_id: str) -> bool:
    try:
        return int(instance, 16) != int(worker_id, 16)
    except ValueError:
        return True


def _restarted(before: Sample, now: Sample) -> bool:
    if before.worker_id and now.worker_id:
        return before.worker_id != now.worker_id
    return before.age_s is not None and now.age_s is not None and now.age_s < before.age_s


class Watch:
    """All workers of a namespace.

    :ivar workers: those that are known, by their ids.
    :ivar trouble: why discovery does not answer; None if it does.
    :ivar read: whether discovery has answered once.
    """

    def __init__(self, discover: Callable[[], Mapping[str, FoundWorker]]) -> None:
        """Watch the workers that ``discover`` returns, which may block and raise OSError."""
        self.workers: dict[str, WatchedWorker] = {}
        self.trouble: str | None = None
        self.read = False
        self._discover = discover
        self._reading: asyncio.Future[Mapping[str, FoundWorker]] | None = None
        self._read_at = -float("inf")
        self._limit = asyncio.Semaphore(_AT_ONCE)

    async def refresh(self, seconds: float) -> None:
        """Look at discovery and ask all workers; those that have not answered after ``seconds`` answer later."""
        await self._look_at_discovery()
        polls = [poll for worker in self.workers.values() if (poll := worker.poll(self._limit)) is not None]
        if polls:
            await asyncio.wait(polls, timeout=min(seconds, ANSWER_SECONDS + 1))
        self._forget()

    async def _look_at_discovery(self) -> None:
        now = time.monotonic()
        if self._reading is None:
            if now - self._read_at < _DISCOVERY_INTERVAL:
                return
            self._read_at = now
            self._reading = in_thread(self._discover)
        # Only the first look is waited for: later, those that are known can be shown meanwhile.
        wait = 0.1 if self.read else _DISCOVERY_SECONDS
        await asyncio.wait({self._reading}, timeout=wait)
        if not self._reading.done():
            if time.monotonic() - self._read_at > _DISCOVERY_SECONDS - 1:
                self.trouble = f"it has not answered for {time.monotonic() - self._read_at:.0f} s"
            return
        reading, self._reading = self._reading, None
        try:
            found = reading.result()
        except OSError as error:
            self.trouble = _reason(error)
            return
        self.trouble, self.read = None, True
        self._compare(found, time.monotonic())

    def _compare(self, found: Mapping[str, FoundWorker], now: float) -> None:
        """Take what discovery knows for the truth."""
        for instance, worker in self.workers.items():
            if instance not in found:
                worker.leave(now)
        # Until a predecessor's registration has expired, both are there.
        places = {worker.found.status: instance for instance, worker in self.workers.items() if worker.found.status}
        for instance, place in found.items():
            known = self.workers.get(instance)
            if known is None:
                known = self.workers[instance] = WatchedWorker(place)
                predecessor = places.get(place.status) if place.status is not None else None
                if predecessor is not None:
                    known.restarted_at = now
                    if self.workers[predecessor].gone_at is not None:
                        del self.workers[predecessor]
            known.found, known.gone_at = place, None

    def _forget(self) -> None:
        now = time.monotonic()
        for instance, worker in list(self.workers.items()):
            if worker.gone_at is not None and now - worker.gone_at > GONE_SECONDS:
                del self.workers[instance]


def in_thread(function: Callable[[], _T]) -> asyncio.Future[_T]:
    """Call a function that may hang for ever: the process can end all the same, which waits for executors' threads."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def call() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=call, name="discovery", daemon=True).start()
    return future


def _reason(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {text}" if error.filename else text
