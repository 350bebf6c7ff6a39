"""Chunks reach their clients complete and in order, and a client that does not read holds up nobody but itself."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from pathlib import Path

import pytest
from aio import until

from dynamo_worker.errors import StartError, WorkerError
from dynamo_worker.host.requests import egress as module
from dynamo_worker.host.requests.egress import Egress
from dynamo_worker.host.requests.streams import SlowClientError


class Client:
    """Stands for the runtime's sender: keeps frames, and blocks while the client does not read."""

    def __init__(self, *, reads=True, fails_at=None, error=None):
        self.frames = []
        self.entered = 0
        self.reads = threading.Event()
        self.fails_at, self.error = fails_at, error
        if reads:
            self.reads.set()

    def transmit(self, chunk):
        assert threading.current_thread() is not threading.main_thread(), "it may block the event loop"
        self.entered += 1
        self.reads.wait(60)
        if self.fails_at is not None and len(self.frames) >= self.fails_at:
            raise self.error
        self.frames.append(chunk)

    @property
    def tokens(self):
        return [token for frame in self.frames for token in frame["token_ids"]]


def token(number, **more):
    return {"token_ids": [number], "index": 0, **more}


class Sending:
    """An egress on the running event loop, with the clients that are given up."""

    def __init__(self, **options):
        self.fatal = []
        self.slow = []
        self.clients = []
        self.egress = Egress(self.fatal.append, **{"slow_client_timeout": 60.0, **options})

    async def __aenter__(self):
        self.egress.start()
        return self

    async def __aexit__(self, *exc):
        for client in self.clients:
            client.reads.set()
        self.egress.stop()

    def open(self, client=None, **options):
        client = client or Client(**options)
        self.clients.append(client)
        stream = self.egress.open(client.transmit, lambda: self.slow.append(client))
        return client, stream

    async def fill(self, **options):
        """Return a client that does not read, its stream, and the wait of an engine that has filled its room."""
        client, stream = self.open(reads=False, **options)
        while not stream.full:
            stream.send(token(stream.given))
        room = asyncio.ensure_future(stream.room())
        await until(lambda: self.egress.slow_streams)
        return client, stream, room

    async def block(self):
        """Return a client that does not read, and its stream, once that is known to be slow."""
        client, stream = self.open(reads=False)
        before = self.egress.slow_streams
        stream.send(token(0))
        await until(lambda: self.egress.slow_streams == before + 1)
        return client, stream


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 30))


@pytest.mark.parametrize("waits", ["behind the send that blocks", "for a slow stream"])
def test_a_malformed_chunk_harms_no_other_stream(waits):
    async def main():
        async with Sending() as sending:
            client, stream = sending.open(reads=False)
            if waits == "for a slow stream":
                client, stream = await sending.block()
            stream.send(token(1))
            stream.send(token(2, top_logprobs=[0.5]))
            await until(lambda: sending.egress.slow_streams == 1)
            other, other_stream = sending.open()
            other_stream.send(token(3))
            await other_stream.flush()
            assert other.tokens == [3]
            client.reads.set()
            await stream.flush()
            assert client.tokens[-2:] == [1, 2]
            assert not sending.fatal

    run(main())


# ------------------------------------------------------------------------------------------------------------ sending


def test_everything_arrives_in_order():
    async def main():
        async with Sending() as sending:
            streams = [sending.open() for _ in range(50)]
            for number in range(200):
                for _, stream in streams:
                    stream.send(token(number))
                if number % 7 == 0:
                    await asyncio.sleep(0)
            await asyncio.gather(*(stream.flush() for _, stream in streams))
            for client, _ in streams:
                assert client.tokens == list(range(200))

    run(main())


def test_what_waits_together_leaves_together_and_no_frame_is_huge():
    async def main():
        async with Sending() as sending:
            client, stream = sending.open()
            for number in range(1000):
                stream.send(token(number))
            await stream.flush()
            assert client.tokens == list(range(1000))
            assert len(client.frames) == 4
            assert max(len(frame["token_ids"]) for frame in client.frames) == 256

    run(main())


def test_flush_waits_until_the_last_chunk_is_sent():
    async def main():
        async with Sending() as sending:
            client, stream = sending.open(reads=False)
            stream.send(token(1))
            flush = asyncio.ensure_future(stream.flush())
            await until(lambda: client.entered)
            await asyncio.sleep(0.05)
            assert not flush.done()
            client.reads.set()
            await flush
            assert client.tokens == [1]

    run(main())


@pytest.mark.parametrize("error", [RuntimeError("closed"), ValueError("cannot be encoded"), SystemExit(3)])
def test_a_send_that_fails_ends_its_stream_only(error):
    async def main():
        async with Sending() as sending:
            client, stream = sending.open(fails_at=1, error=error)
            other, other_stream = sending.open()
            stream.send(token(1))
            await until(lambda: client.frames)
            stream.send(token(2))
            stream.send(token(3, finish_reason="stop"))
            other_stream.send(token(4))
            with pytest.raises(type(error)):
                await stream.flush()
            with pytest.raises(type(error)):
                stream.send(token(5))
            await other_stream.flush()
            assert client.tokens == [1]
            assert other.tokens == [4]
            assert sending.fatal == []

    run(main())


def test_an_abandoned_stream_sends_nothing_more():
    async def main():
        async with Sending() as sending:
            client, stream = sending.open(reads=False)
            stream.send(token(1))
            await until(lambda: client.entered)
            stream.send(token(2))
            stream.abandon()
            client.reads.set()
            await until(lambda: not sending.egress.slow_streams)
            other, other_stream = sending.open()
            other_stream.send(token(3))
            await other_stream.flush()
            assert client.tokens == [1]
            assert other.tokens == [3]

    run(main())


def test_an_engine_that_can_wait_does():
    async def main():
        async with Sending() as sending:
            client, stream, room = await sending.fill()
            await asyncio.sleep(0.1)
            assert not room.done()
            client.reads.set()
            await room
            given = stream.given
            await stream.flush()
            assert client.tokens == list(range(given))

    run(main())


def test_alternatives_to_tokens_take_their_share_of_the_room():
    """Hundreds of thousands of small objects in line keep the garbage collector at work, at everybody's cost."""

    async def main():
        async with Sending() as sending:
            client, stream = sending.open(reads=False)
            sent = 0
            while not stream.full:
                stream.send(token(sent, log_probs=[-0.1], top_logprobs=[[{"rank": 1}] * 20]))
                sent += 1
            assert sent <= 40
            client.reads.set()
            await stream.room()
            await stream.flush()
            assert client.tokens == list(range(sent))
            assert stream.given == stream.taken

    run(main())


def test_an_engine_that_waits_is_told_when_a_short_hold_up_is_over():
    """The stream goes back to the carrier at once then; nothing more comes of an engine that waits."""

    async def main():
        async with Sending() as sending:
            client, stream, room = await sending.fill()
            client.reads.set()
            await asyncio.wait_for(room, 5)
            given = stream.given
            await stream.flush()
            assert client.tokens == list(range(given))

    run(main())


def test_a_carrier_that_is_held_up_keeps_nobody_waiting():
    """What it had to report is reported by the next one."""

    async def main():
        async with Sending() as sending:
            (first, quick), (_, stuck) = sending.open(), sending.open(reads=False)
            quick.send(token(1))
            stuck.send(token(1))  # sent right behind the other, in the same round
            await asyncio.wait_for(quick.flush(), 5)
            for _ in range(5):
                _, stuck = sending.open(reads=False)
                flush = asyncio.ensure_future(quick_flush(sending))
                await asyncio.sleep(0)
                stuck.send(token(1))
                await asyncio.wait_for(flush, 5)
            assert first.tokens == [1]

    async def quick_flush(sending):
        _, stream = sending.open()
        stream.send(token(1))
        await stream.flush()

    run(main())


def test_who_waits_for_room_learns_that_the_client_is_gone():
    async def main():
        async with Sending() as sending:
            client, _, room = await sending.fill(fails_at=0, error=RuntimeError("gone"))
            client.reads.set()
            with pytest.raises(RuntimeError, match="gone"):
                await room

    run(main())


# ------------------------------------------------------------------------------------------------------- slow clients


@pytest.mark.parametrize("count", [1, 64])
def test_clients_that_do_not_read_hold_up_nobody_else(count):
    async def main():
        async with Sending() as sending:
            blocked = [sending.open(reads=False) for _ in range(count)]
            reader, stream = sending.open()
            for number in range(100):
                for _, slow in blocked:
                    slow.send(token(number))
                stream.send(token(number))
                await asyncio.sleep(0.005)
            await stream.flush()
            assert reader.tokens == list(range(100))
            assert sending.egress.slow_streams == count
            # Whoever was merely slow has lost nothing.
            for client, _ in blocked:
                client.reads.set()
            await asyncio.gather(*(slow.flush() for _, slow in blocked))
            for client, _ in blocked:
                assert client.tokens == list(range(100))
            await until(lambda: not sending.egress.slow_streams)

    run(main())


def test_a_client_that_reads_by_fits_and_starts_gets_everything_in_order():
    async def main():
        async with Sending() as sending:
            client, stream = sending.open()
            over = threading.Event()

            def jerk():
                while not over.wait(0.03):
                    (client.reads.clear if client.reads.is_set() else client.reads.set)()
                client.reads.set()

            thread = threading.Thread(target=jerk)
            thread.start()
            for number in range(500):
                stream.send(token(number))
                await asyncio.sleep(0.001)
            over.set()
            thread.join()
            await stream.flush()
            assert client.tokens == list(range(500))

    run(main())


def test_a_slow_stream_that_has_caught_up_needs_no_thread_of_its_own(monkeypatch):
    monkeypatch.setattr(module, "_CAUGHT_UP", 0.1)
    monkeypatch.setattr(module, "_SLOW_SECONDS", 0.02)

    async def main():
        async with Sending() as sending:
            client, stream = await sending.block()
            await asyncio.sleep(0.1)
            client.reads.set()
            await until(lambda: not sending.egress.slow_streams)
            stream.send(token(1))
            await stream.flush()
            assert client.tokens == [0, 1]

    run(main())


def threads():
    """Return how many threads of this process send: those that other tests have left may be among them."""
    found = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            found += path.read_text() == "dw-egress\n"
    return found


def test_threads_do_not_pile_up():
    async def main():
        before = threads()
        async with Sending() as sending:
            for _ in range(20):
                client, stream = await sending.block()
                client.reads.set()
                await stream.flush()
            await until(lambda: threads() <= before + 3)
        await until(lambda: threads() <= before)

    run(main())


def test_a_client_that_does_not_read_for_too_long_is_given_up():
    async def main():
        async with Sending(slow_client_timeout=0.3) as sending:
            client, stream = sending.open(reads=False)
            stream.send(token(1))
            flush = asyncio.ensure_future(stream.flush())
            started = time.monotonic()
            await until(lambda: sending.slow)
            assert time.monotonic() - started >= 0.25
            assert sending.slow == [client]
            with pytest.raises(SlowClientError, match="has not read for"):
                stream.send(token(2))
            client.reads.set()
            with pytest.raises(SlowClientError):
                await flush
            assert client.tokens == [1]

    run(main())


def test_no_limit_gives_nobody_up(monkeypatch):
    monkeypatch.setattr(module, "_SLOW_TICK", 0.02)

    async def main():
        async with Sending(slow_client_timeout=0.0) as sending:
            await sending.block()
            await asyncio.sleep(0.2)
            assert not sending.slow

    run(main())


def test_what_waits_for_a_client_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING", 500)

    async def main():
        async with Sending() as sending:
            client, stream = await sending.block()
            sent = 0
            while stream.error is None:
                stream.send(token(1))
                sent += 1
                await asyncio.sleep(0)
                assert sent < 10_000
            assert sending.slow == [client]
            with pytest.raises(SlowClientError, match="too much data waits"):
                stream.send(token(1))

    run(main())


def test_what_waits_for_all_clients_is_bounded_and_the_heaviest_goes(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING_IN_ALL", 1000)
    monkeypatch.setattr(module, "_SLOW_TICK", 0.02)

    async def main():
        async with Sending() as sending:
            (_, light), (heavy_client, heavy) = await sending.block(), await sending.block()
            for _ in range(30):
                light.send(token(1))
            for _ in range(300):
                heavy.send(token(1))
            await until(lambda: sending.slow)
            await asyncio.sleep(0.1)
            assert sending.slow == [heavy_client]
            assert light.error is None

    run(main())


def test_everything_that_is_too_much_goes_at_once(monkeypatch):
    """One at each look would let memory grow for as long as there are more."""
    monkeypatch.setattr(module, "_MOST_WAITING_IN_ALL", 100)

    async def main():
        async with Sending() as sending:
            streams = [(await sending.block())[1] for _ in range(5)]
            monkeypatch.setattr(module, "_SLOW_TICK", 60.0)
            sending.egress._slow_due = math.inf
            for stream in streams:
                for _ in range(10):
                    stream.send(token(1))
            await until(lambda: sending.egress._waiting >= 5 * 10 * 9)
            sending.egress._check_slow(time.monotonic())
            assert len(sending.slow) == 4
            assert sending.egress._waiting <= 100

    run(main())


def test_too_many_slow_clients(monkeypatch):
    """New requests go elsewhere. Nobody is given up for it: the frontend holds our thread until the client leaves."""
    monkeypatch.setattr(module, "_MANY_SLOW", 3)
    monkeypatch.setattr(module, "_SLOW_TICK", 0.02)

    async def main():
        async with Sending() as sending:
            for _ in range(2):
                await sending.block()
            assert sending.egress.refusal is None
            for _ in range(2):
                await sending.block()
            assert "4 clients of this worker do not read" in sending.egress.refusal
            await asyncio.sleep(0.2)
            assert not sending.slow
            assert sending.egress.slow_streams == 4

    run(main())


def test_a_send_that_blocks_late_is_noticed_although_nothing_else_happens(monkeypatch):
    """Between taking a batch and sending it the carrier looks idle; the look at that moment must not be the last."""

    async def main():
        async with Sending() as sending:
            take = sending.egress._take

            def late(batch):
                time.sleep(5 * module._TICK)
                take(batch)

            monkeypatch.setattr(sending.egress, "_take", late)
            _, first = sending.open()
            await first.flush()  # the carrier had looked the function up already
            await asyncio.sleep(10 * module._TICK)
            _, stream = sending.open(reads=False)
            stream.send(token(0))
            await until(lambda: sending.egress.slow_streams == 1)

    run(main())


# ------------------------------------------------------------------------------------------------- the system's limits


def refuse(*arguments):
    raise RuntimeError("can't start new thread")


def die_at_birth(*arguments):
    """For want of memory a thread may end before its first line, and nobody is told."""


@pytest.mark.parametrize("start", [refuse, die_at_birth])
def test_without_another_thread_clients_wait_and_then_the_worker_ends(monkeypatch, caplog, start):
    monkeypatch.setattr(module, "_BIRTH_SECONDS", 0.05)
    monkeypatch.setattr(module, "_STRANDED_SECONDS", 0.3)

    async def main():
        async with Sending() as sending:
            monkeypatch.setattr(module._thread, "start_new_thread", start)
            await sending.block()  # the spare thread takes over
            reader, stream = sending.open()
            stream.send(token(1))
            await stream.flush()
            assert reader.tokens == [1]
            assert not sending.fatal
            _, second = sending.open(reads=False)
            second.send(token(1))
            await until(lambda: sending.fatal)
            assert isinstance(sending.fatal[0], WorkerError)
            assert "no thread can be started" in str(sending.fatal[0])
            assert sending.egress.refusal == "this worker has no thread to send with"

    run(main())
    assert ("No thread to send with" in caplog.text) == (start is refuse)


@pytest.mark.parametrize("start", [refuse, die_at_birth])
def test_without_a_thread_nothing_starts(monkeypatch, start):
    monkeypatch.setattr(module, "_BIRTH_SECONDS", 0.05)
    monkeypatch.setattr(module._thread, "start_new_thread", start)

    async def main():
        with pytest.raises(StartError, match="no thread can be started to send with"):
            Egress(pytest.fail, slow_client_timeout=60.0).start()

    run(main())


def test_it_recovers_when_there_is_a_thread_again(monkeypatch):
    monkeypatch.setattr(module, "_BIRTH_SECONDS", 0.05)
    start = module._thread.start_new_thread

    async def main():
        async with Sending() as sending:
            monkeypatch.setattr(module._thread, "start_new_thread", refuse)
            await sending.block()
            _, second = sending.open(reads=False)
            second.send(token(1))
            await until(lambda: sending.egress.refusal)
            monkeypatch.setattr(module._thread, "start_new_thread", start)
            reader, stream = sending.open()
            stream.send(token(1))
            await stream.flush()
            assert reader.tokens == [1]
            await until(lambda: sending.egress.refusal is None)
            assert not sending.fatal

    run(main())


def test_a_thread_that_takes_its_time_to_come_up_has_nobody_refused(monkeypatch):
    start = module._thread.start_new_thread

    def start_late(function, arguments):
        def late():
            time.sleep(0.2)
            function(*arguments)

        start(late, ())

    async def main():
        async with Sending() as sending:
            monkeypatch.setattr(module._thread, "start_new_thread", start_late)
            await sending.block()  # takes the spare thread; the next one comes late
            _, second = sending.open(reads=False)
            second.send(token(1))
            refusals = set()

            def second_is_slow():
                refusals.add(sending.egress.refusal)
                return sending.egress.slow_streams == 2

            await until(second_is_slow)
            assert refusals == {None}

    run(main())


def test_requests_are_taken_again_when_the_carrier_gets_through_by_itself(monkeypatch):
    monkeypatch.setattr(module, "_BIRTH_SECONDS", 0.05)

    async def main():
        async with Sending() as sending:
            monkeypatch.setattr(module._thread, "start_new_thread", refuse)
            blocked, _ = await sending.block()
            client, stream = sending.open(reads=False)
            stream.send(token(1))
            await until(lambda: sending.egress.refusal)
            # Both get through, just after the carrier was found held up.
            look = sending.egress._replace_carrier

            def late(held_up):
                look(held_up)
                for each in (blocked, client):
                    each.reads.set()
                deadline = time.monotonic() + 10
                while sending.egress._sending is not None or sending.egress.slow_streams:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)

            monkeypatch.setattr(sending.egress, "_replace_carrier", late)
            await until(lambda: sending.egress.refusal is None)
            assert not sending.fatal

    run(main())


def test_the_last_chunk_may_come_while_the_keeper_says_that_nothing_waits(monkeypatch):
    """What it says is what it has seen: a request must not end with its last chunk unsent."""
    report = Egress._report

    def late(egress, streams):
        for stream, _ in streams:
            if stream.slow and not stream.ended:  # what the carrier does
                stream.chunks.append(token(2))
                stream.ended = True
        report(egress, streams)

    async def main():
        async with Sending() as sending:
            client, stream = await sending.block()
            monkeypatch.setattr(Egress, "_report", late)
            stream.wants_room = True
            monkeypatch.setattr(sending.egress, "collect", lambda *_: None)
            await asyncio.sleep(2 * module._SLOW_SECONDS)  # held up for so long, it is kept for a while
            client.reads.set()
            await stream.flush()
            assert client.tokens == [0, 2]

    run(main())


def test_a_bug_in_sending_ends_the_worker(monkeypatch):
    async def main():
        async with Sending() as sending:
            monkeypatch.setattr(module, "_next", lambda stream: 1 / 0)
            _, stream = sending.open()
            stream.send(token(1))
            await until(lambda: sending.fatal)
            assert "sending failed: ZeroDivisionError" in str(sending.fatal[0])

    run(main())
