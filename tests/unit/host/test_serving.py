"""Requests end the way the frontend has to see them end, and nothing stays in the registry or the engine."""

from __future__ import annotations

import asyncio
import inspect
import struct
import sys
from array import array

import pytest
from aio import settle, until
from dynamo.llm.exceptions import (
    Cancelled,
    Disconnected,
    EngineShutdown,
    InvalidArgument,
    StreamIncomplete,
    Unknown,
    WorkerUnavailable,
)
from dynamo.runtime import Context
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.engine import EndpointSpec, LocalContext, RequestContext
from dynamo_worker.errors import EngineDeadError, InvalidRequestError
from dynamo_worker.host.config.drain_mode import Cut
from dynamo_worker.host.requests import serving
from dynamo_worker.host.requests.egress import Egress
from dynamo_worker.host.requests.serving import RequestHandler, RequestOutcome, RequestRegistry
from dynamo_worker.host.requests.token_kind import TokenRequests, validated
from dynamo_worker.kit.push_engine import pulled

REQUEST = {"token_ids": [5, 6, 7]}


def chunk(token, finish_reason=None):
    return {"token_ids": [token], "index": 0, **({"finish_reason": finish_reason} if finish_reason else {})}


def joined(chunks):
    """Return the tokens and the finish reason: chunks that wait together leave as one."""
    return [token for item in chunks for token in item["token_ids"]], chunks[-1].get("finish_reason")


CHUNKS = [chunk(1), chunk(2), chunk(3, "stop")]


class FakeEngine:
    """Streams ``CHUNKS``; an exception among them is raised, an event is waited for."""

    def __init__(self, *steps):
        self.steps = steps or CHUNKS
        self.aborted = []
        self.closed = 0
        self.requests = []

    async def generate(self, request, context):
        self.requests.append((request, context.id()))
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
                    await asyncio.sleep(0)
        finally:
            self.closed += 1

    async def abort(self, request_id):
        self.aborted.append(request_id)


class PushingEngine(FakeEngine):
    """The same, which hands its chunks over itself."""

    async def push(self, request, context, send):
        async for item in super().generate(request, context):
            send(item)

    def generate(self, request, context):
        return pulled(self.push, request, context)


EGRESSES = []


def new_egress():
    """Return what sends, started on the running event loop; a fixture stops it."""
    EGRESSES.append(Egress(pytest.fail, slow_client_timeout=60.0))
    EGRESSES[-1].start()
    return EGRESSES[-1]


@pytest.fixture(autouse=True)
def stop_egresses():
    yield
    while EGRESSES:
        EGRESSES.pop().stop()


class Sender:
    """Takes chunks as the Rust object does; ``close`` makes it refuse them as that one does."""

    def __init__(self, on_send=None):
        self.sent = []
        self.on_send = on_send
        self.closed = False

    def send(self, item, /):
        if self.closed:
            raise RuntimeError("response stream is closed")
        self.sent.append(item)
        if self.on_send:
            self.on_send(self)


class Served:
    """One endpoint of an engine, with what it told the worker."""

    def __init__(self, engine, *, graceful=True, registry=None, generate=None, kind=None):
        self.engine = engine
        self.registry = RequestRegistry() if registry is None else registry
        self.dead = []
        self.egress = new_egress()
        self.requests = RequestHandler(engine, self.registry, self.egress, self.dead.append, kind or TokenRequests())
        self.handler = self.requests.handler(EndpointSpec("generate", generate, graceful_shutdown=graceful))

    async def request(self, context=None, sender=None, request=None):
        """Make one request and return its chunks: those that were sent, or those that were yielded."""
        yielded = [item async for item in self.handler(dict(request or REQUEST), context or Context(id="r"), sender)]
        return sender.sent + yielded if sender else yielded

    def start(self, context=None, sender=None):
        return asyncio.ensure_future(self.request(context, sender))

    def counted(self):
        return {outcome: count for outcome, count in self.registry.outcomes.items() if count}


# ------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("engine", [FakeEngine, PushingEngine])
@pytest.mark.parametrize("push", [False, True], ids=["pull", "push"])
def test_a_request_brings_every_chunk_in_order(push, engine):
    async def main():
        sender = Sender() if push else None
        served = Served(engine())
        assert joined(await served.request(sender=sender)) == joined(CHUNKS)
        await settle()
        assert served.counted() == {RequestOutcome.COMPLETED: 1}
        assert served.registry.chunks == 3
        assert len(served.registry) == 0
        assert served.engine.aborted == [], "a completed request is nothing to abort"
        assert served.engine.requests == [(REQUEST, "r")]

    asyncio.run(main())


def test_with_a_sender_nothing_is_yielded():
    async def main():
        sender = Sender()
        served = Served(FakeEngine())
        assert [item async for item in served.handler(dict(REQUEST), Context(id="r"), response_sender=sender)] == []
        assert joined(sender.sent) == joined(CHUNKS)

    asyncio.run(main())


def test_the_handler_is_what_the_runtime_looks_for():
    async def main():
        handler = Served(FakeEngine()).handler
        assert inspect.isasyncgenfunction(handler)
        assert list(inspect.signature(handler).parameters) == ["request", "context", "response_sender"]

    asyncio.run(main())


def test_an_endpoint_may_have_a_function_of_its_own():
    async def clear(request, context):
        yield {"cleared": request["token_ids"], "by": context.id()}

    async def main():
        served = Served(FakeEngine(), generate=clear)
        assert await served.request() == [{"cleared": [5, 6, 7], "by": "r"}]

    asyncio.run(main())


def test_what_sends_no_tokens_needs_no_thread_to_send_with(monkeypatch):
    """Putting the engine to sleep must be possible while clients do not read."""
    monkeypatch.setattr(Egress, "refusal", "too many clients do not read")

    async def operate(request, context):
        yield {"status": "success"}

    async def main():
        served = Served(FakeEngine())
        with pytest.raises(Exception, match="too many clients do not read"):
            await served.request(sender=Sender())
        assert await served.request(), "a caller inside of the process"
        spec = EndpointSpec("operate", operate, takes_tokens=False)
        handler = served.requests.handler(spec)
        sender = Sender()
        assert [item async for item in handler({}, Context(id="o"), sender)] == []
        assert sender.sent == [{"status": "success"}]

    asyncio.run(main())


def test_requests_at_once_do_not_mix():
    async def main():
        class Counting(FakeEngine):
            async def generate(self, request, context):
                for number in range(20):
                    yield chunk(request["token_ids"][0] * 100 + number)
                    await asyncio.sleep(0)

        served = Served(Counting())
        results = await asyncio.gather(
            *(served.request(Context(id=f"{n}"), Sender(), {"token_ids": [n]}) for n in range(1, 51))
        )
        for number, result in enumerate(results, 1):
            assert joined(result) == joined([chunk(number * 100 + step) for step in range(20)])
        assert served.counted() == {RequestOutcome.COMPLETED: 50}
        assert served.registry.chunks == 50 * 20

    asyncio.run(main())


# -------------------------------------------------------------------------------------------- refusing and being cut


def test_a_refused_request_goes_to_another_worker():
    async def main():
        served = Served(FakeEngine())
        served.registry.refuse("the worker is shutting down")
        with pytest.raises(WorkerUnavailable, match="the worker is shutting down"):
            await served.request()
        await settle()
        assert served.engine.requests == [], "the engine never saw it"
        assert served.engine.aborted == []
        assert served.counted() == {RequestOutcome.REFUSED: 1}
        assert len(served.registry) == 0

    asyncio.run(main())


def test_refusing_leaves_those_in_flight_alone():
    async def main():
        go_on = asyncio.Event()
        served = Served(FakeEngine(chunk(1), go_on, chunk(2, "stop")))
        running = served.start()
        await until(lambda: served.registry.chunks == 1)
        served.registry.refuse("no more")
        assert served.registry.refusing
        go_on.set()
        assert await running == [chunk(1), chunk(2, "stop")]

    asyncio.run(main())


@pytest.mark.parametrize("engine", [FakeEngine, PushingEngine])
@pytest.mark.parametrize("push", [False, True], ids=["pull", "push"])
@pytest.mark.parametrize(
    ("how", "error", "outcome"),
    [
        (Cut.HANDOFF, EngineShutdown, RequestOutcome.HANDED_OFF),
        (Cut.ABORT, Cancelled, RequestOutcome.ABORTED),
    ],
    ids=["handoff", "abort"],
)
def test_cut(how, error, outcome, push, engine):
    async def main():
        sender = Sender() if push else None
        served = Served(engine(chunk(1), asyncio.Event()))
        running = served.start(sender=sender)
        await until(lambda: served.registry.chunks == 1)
        assert served.registry.cut(how) == 1
        with pytest.raises(error):
            await running
        await settle()
        assert served.counted() == {outcome: 1}
        assert served.engine.aborted == ["r"]
        assert served.engine.closed == 1
        await asyncio.wait_for(served.registry.wait_idle(), 1)

    asyncio.run(main())


def test_a_request_that_was_cut_is_not_cut_again():
    """A first cut decides: what is being handed off does not turn into an abort."""

    async def main():
        served = Served(FakeEngine(asyncio.Event()))
        running = served.start()
        await until(lambda: len(served.registry) == 1)
        assert [served.registry.cut(Cut.HANDOFF), served.registry.cut(Cut.ABORT)] == [1, 0]
        with pytest.raises(EngineShutdown):
            await running

    asyncio.run(main())


def test_only_endpoints_without_a_graceful_shutdown_are_cut_first():
    async def main():
        registry = RequestRegistry()
        waiting = asyncio.Event()
        graceful = Served(FakeEngine(waiting, chunk(9, "stop")), registry=registry)
        hasty = Served(FakeEngine(asyncio.Event()), registry=registry, graceful=False)
        first, second = graceful.start(), hasty.start()
        await until(lambda: len(registry) == 2)
        assert registry.cut(Cut.HANDOFF, graceful=False) == 1
        with pytest.raises(EngineShutdown):
            await second
        waiting.set()
        assert await first == [chunk(9, "stop")]

    asyncio.run(main())


def test_wait_idle_waits_for_the_last_one():
    async def main():
        go_on = asyncio.Event()
        served = Served(FakeEngine(go_on, chunk(1, "stop")))
        await asyncio.wait_for(served.registry.wait_idle(), 1)
        running = [served.start(Context(id=f"{n}")) for n in range(3)]
        await until(lambda: len(served.registry) == 3)
        idle = asyncio.ensure_future(served.registry.wait_idle())
        await settle()
        assert not idle.done()
        go_on.set()
        await asyncio.gather(*running)
        await asyncio.wait_for(idle, 1)

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------- the client is gone


@pytest.mark.parametrize("engine", [FakeEngine, PushingEngine])
@pytest.mark.parametrize("push", [False, True], ids=["pull", "push"])
def test_a_client_that_goes_away_cancels_its_request_only(push, engine):
    async def main():
        go_on = asyncio.Event()
        served = Served(engine(chunk(1), go_on, chunk(2, "stop")))
        leaving, staying = Context(id="leaving"), Context(id="staying")
        first = served.start(leaving, Sender() if push else None)
        second = served.start(staying, Sender() if push else None)
        await until(lambda: served.registry.chunks == 2)
        leaving.stop_generating()
        with pytest.raises(Cancelled, match="client"):
            await asyncio.wait_for(first, 5)
        go_on.set()
        assert await second == [chunk(1), chunk(2, "stop")]
        await settle()
        assert served.engine.aborted == ["leaving"]
        assert served.counted() == {RequestOutcome.CANCELLED: 1, RequestOutcome.COMPLETED: 1}

    asyncio.run(main())


def test_a_sender_whose_stream_is_closed_ends_the_request_quietly(caplog):
    """The client goes away in the middle of a burst: the sender says so before the cancellation arrives."""

    async def main():
        context = Context(id="r")

        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close(sender):
            context.stop_generating()
            sender.closed = True
            loop.call_soon_threadsafe(closed.set)

        served = Served(FakeEngine(chunk(1), closed, chunk(2), chunk(3, "stop")))
        with pytest.raises(Cancelled):
            await served.request(context, Sender(close))
        await settle()
        assert served.counted() == {RequestOutcome.CANCELLED: 1}
        assert served.engine.aborted == ["r"]

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_sender_that_fails_for_another_reason_is_a_failure(caplog):
    async def main():
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close(sender):
            sender.closed = True
            loop.call_soon_threadsafe(closed.set)

        sender = Sender(close)
        served = Served(FakeEngine(chunk(1), closed, chunk(2), chunk(3, "stop")))
        with pytest.raises(Unknown, match="RuntimeError: response stream is closed"):
            await served.request(sender=sender)
        await settle()
        assert served.counted() == {RequestOutcome.FAILED: 1}
        assert served.engine.aborted == ["r"]

    asyncio.run(main())
    assert "Request failed" in caplog.text


@pytest.mark.parametrize("engine", [FakeEngine, PushingEngine])
def test_an_in_process_client_may_stop_iterating(engine):
    async def main():
        served = Served(engine())
        stream = served.handler(dict(REQUEST), Context(id="r"))
        assert await stream.__anext__() == CHUNKS[0]
        await stream.aclose()
        await settle()
        assert served.counted() == {RequestOutcome.CANCELLED: 1}
        assert served.engine.aborted == ["r"]
        assert len(served.registry) == 0

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("engine", [FakeEngine, PushingEngine])
def test_a_dead_engine_is_reported_and_the_request_goes_on_elsewhere(engine):
    async def main():
        death = EngineDeadError("the core is gone", hint="look at dmesg")
        served = Served(engine(chunk(1), death))
        with pytest.raises(EngineShutdown, match="the core is gone"):
            await served.request(sender=Sender())
        await settle()
        assert served.dead == [death]
        assert served.counted() == {RequestOutcome.HANDED_OFF: 1}

    asyncio.run(main())


def test_a_wrong_request_is_told_to_its_client_and_to_nobody_else():
    async def main():
        error = InvalidRequestError("top_k must be positive")
        served = Served(FakeEngine(error))
        with pytest.raises(InvalidArgument, match="top_k") as raised:
            await served.request()
        assert str(error) in str(raised.value)
        await settle()
        assert served.counted() == {RequestOutcome.INVALID: 1}
        assert served.dead == []

    asyncio.run(main())


def test_a_request_without_tokens_never_reaches_the_engine():
    async def main():
        served = Served(FakeEngine())
        with pytest.raises(InvalidArgument, match="empty"):
            await served.request(request={"token_ids": []})
        await settle()
        assert served.engine.requests == []
        assert served.engine.aborted == [], "the engine never had it"
        assert served.counted() == {RequestOutcome.INVALID: 1}

    asyncio.run(main())


def test_errors_of_dynamo_pass_as_they_are():
    """Their type decides whether the frontend migrates."""

    async def main():
        error = StreamIncomplete("prefill worker gone")
        served = Served(FakeEngine(chunk(1), error))
        with pytest.raises(StreamIncomplete) as raised:
            await served.request()
        assert raised.value is error
        assert served.counted() == {RequestOutcome.FAILED: 1}

    asyncio.run(main())


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


#: What an engine can raise beside what it should, and what the runtime is told then.
BUGS = {
    "bug": (ZeroDivisionError("bug"), Unknown, "ZeroDivisionError: bug"),
    "ValueError": (ValueError("bug"), Unknown, "ValueError: bug"),
    "a bug with much to say": (ValueError("x" * 9999), Unknown, f"ValueError: {'x' * 988}…$"),
    "TypeError": (TypeError("bug"), Unknown, "TypeError: bug"),
    "panic": (PanicException("called unwrap"), Unknown, "PanicException: called unwrap"),
    "SystemExit": (SystemExit(0), Unknown, "SystemExit: 0"),
    "KeyboardInterrupt": (KeyboardInterrupt(), Unknown, "KeyboardInterrupt"),
    "GeneratorExit": (GeneratorExit(), Unknown, "GeneratorExit"),
    "CancelledError": (asyncio.CancelledError(), Disconnected, "the engine cancelled the request"),
}


@pytest.mark.parametrize("engine", [FakeEngine, PushingEngine])
@pytest.mark.parametrize(
    ("bug", "push"),
    [(bug, push) for bug in BUGS for push in ("push", "pull") if (bug, push) != ("GeneratorExit", "pull")],
)
@pytest.mark.parametrize("begun", [False, True], ids=["before the first chunk", "after a chunk"])
def test_any_other_error_is_the_engines_and_logged_with_its_request(caplog, bug, begun, push, engine):
    error, kind, message = BUGS[bug]

    async def main():
        served = Served(engine(*([chunk(1)] if begun else []), error))
        with pytest.raises(kind, match=message) as raised:
            await served.request(sender=Sender() if push == "push" else None)
        assert raised.value.__cause__ is None, "a CancelledError there would keep the frontend from migrating"
        await settle()
        assert served.counted() == {RequestOutcome.FAILED: 1}
        assert served.engine.aborted == ["r"]
        assert len(served.registry) == 0

    asyncio.run(main())
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.fields["request_id"] == "r"
    assert record.exc_info


@pytest.mark.parametrize("push", [False, True], ids=["pull", "push"])
def test_an_engine_that_makes_something_else_of_its_cancellation(push):
    """What cancelled it decides, not what became of it."""

    class Converting(FakeEngine):
        async def generate(self, request, context):
            yield chunk(1)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise RuntimeError("cancelled") from None

    async def main():
        served = Served(Converting())
        running = served.start(sender=Sender() if push else None)
        await until(lambda: served.registry.chunks == 1)
        served.registry.cut(Cut.HANDOFF)
        with pytest.raises(EngineShutdown, match="handed off"):
            await running
        assert served.counted() == {RequestOutcome.HANDED_OFF: 1}

    asyncio.run(main())


def test_a_timeout_of_the_engine_migrates():
    """``asyncio.wait_for`` makes a CancelledError its cause, which would keep the frontend from migrating."""

    class Waiting(FakeEngine):
        async def generate(self, request, context):
            yield chunk(1)
            await asyncio.wait_for(asyncio.sleep(60), 0.01)

    async def main():
        with pytest.raises(asyncio.TimeoutError) as raised:
            await Served(Waiting()).request(sender=Sender())
        assert raised.value.__cause__ is None

    asyncio.run(main())


def test_an_error_that_cannot_be_read(caplog):
    class UnreadableError(Exception):
        def __str__(self):
            raise RuntimeError("no")

    async def main():
        with pytest.raises(Unknown, match="UnreadableError: its message cannot be read"):
            await Served(FakeEngine(UnreadableError())).request()

    asyncio.run(main())
    assert "Request failed" in caplog.text


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), BrokenPipeError(), asyncio.TimeoutError()])
def test_a_connection_that_breaks_is_left_to_the_runtime(error):
    """It knows these types and lets the request migrate."""

    async def main():
        served = Served(FakeEngine(chunk(1), error))
        with pytest.raises(type(error)) as raised:
            await served.request()
        assert raised.value is error
        assert served.counted() == {RequestOutcome.FAILED: 1}

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [OSError("socket closed"), PanicException("poisoned"), SystemExit(1), asyncio.CancelledError()], ids=repr
)
def test_an_abort_that_fails_harms_nobody(caplog, error):
    async def main():
        class Stubborn(FakeEngine):
            async def abort(self, request_id):
                raise error

        served = Served(Stubborn(chunk(1), asyncio.Event()))
        running = served.start()
        await until(lambda: served.registry.chunks == 1)
        served.registry.cut(Cut.HANDOFF)
        with pytest.raises(EngineShutdown):
            await running
        await settle()

    asyncio.run(main())
    assert "Abort failed" in caplog.text
    (record,) = [record for record in caplog.records if record.getMessage() == "Abort failed"]
    assert type(error).__name__ in record.fields["error"]


def test_an_abort_that_hangs_is_given_up(caplog, monkeypatch):
    monkeypatch.setattr(serving, "_ABORT_SECONDS", 0.05)

    async def main():
        class Hanging(FakeEngine):
            async def abort(self, request_id):
                await asyncio.sleep(60)

        served = Served(Hanging(chunk(1), asyncio.Event()))
        running = served.start()
        await until(lambda: served.registry.chunks == 1)
        served.registry.cut(Cut.HANDOFF)
        with pytest.raises(EngineShutdown):
            await running
        assert len(served.requests._aborts) == 1
        await until(lambda: not served.requests._aborts)

    asyncio.run(main())
    (record,) = [record for record in caplog.records if record.getMessage() == "Abort failed"]
    assert record.fields == {"request_id": "r", "error": "timed out after 0.05 s"}


def test_the_engine_aborts_even_if_its_stream_cannot_be_closed():
    async def main():
        class Untidy(FakeEngine):
            async def generate(self, request, context):
                try:
                    yield chunk(1)
                finally:
                    raise OSError("cannot close")

        served = Served(Untidy())
        stream = served.handler(dict(REQUEST), Context(id="r"))
        await stream.__anext__()
        await stream.aclose()
        await settle()
        assert served.engine.aborted == ["r"]

    asyncio.run(main())


def test_an_engine_may_return_any_iterator():
    """The protocol asks for an asynchronous iterator, not for a generator: there may be nothing to close."""

    class Plain:
        def __init__(self):
            self.left = 3

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                await asyncio.sleep(60)
            self.left -= 1
            return chunk(self.left)

    class Engine(FakeEngine):
        def generate(self, request, context):
            return Plain()

    async def main():
        served = Served(Engine())
        running = served.start()
        await until(lambda: served.registry.chunks == 3)
        served.registry.cut(Cut.ABORT)
        with pytest.raises(Cancelled):
            await running
        await settle()
        assert served.engine.aborted == ["r"]

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- registry


def test_every_admitted_request_is_counted_once():
    """Admission, cut and release of 10 000 entries: each is touched a fixed number of times, whatever the order."""

    class Counted(set):
        operations = 0

        def add(self, item):
            Counted.operations += 1
            super().add(item)

        def discard(self, item):
            Counted.operations += 1
            super().discard(item)

        def __iter__(self):
            for item in super().__iter__():
                Counted.operations += 1
                yield item

    async def main(count):
        registry = RequestRegistry()
        registry._entries = Counted()
        Counted.operations = 0
        waiting = asyncio.Event()

        async def hold(number):
            entry = registry.admit(str(number), graceful=number % 2 == 0)
            outcome = RequestOutcome.FAILED
            try:
                await waiting.wait()
            except asyncio.CancelledError:
                outcome = RequestOutcome.HANDED_OFF
            finally:
                registry.release(entry, outcome)

        tasks = [asyncio.ensure_future(hold(number)) for number in range(count)]
        await asyncio.sleep(0)
        assert len(registry) == count
        assert registry.cut(Cut.HANDOFF, graceful=False) == count // 2
        assert registry.cut(Cut.HANDOFF) == count // 2
        await asyncio.gather(*tasks)
        await asyncio.wait_for(registry.wait_idle(), 1)
        assert registry.outcomes[RequestOutcome.HANDED_OFF] == count
        return Counted.operations

    hundred, ten_thousand = asyncio.run(main(100)), asyncio.run(main(10_000))
    assert ten_thousand <= 100 * hundred, "more than linear"


@given(st.lists(st.sampled_from(["admit", "release", "cut", "refuse"]), max_size=60))
def test_the_registry_always_knows_how_many_are_in_flight(steps):
    async def main():
        registry = RequestRegistry()
        inside, refusing, refused, released = [], False, 0, 0
        for step in steps:
            if step == "admit":
                try:
                    inside.append(registry.admit("r", graceful=True))
                    assert not refusing
                except WorkerUnavailable:
                    refused += 1
                    assert refusing
            elif step == "release" and inside:
                registry.release(inside.pop(), RequestOutcome.COMPLETED)
                released += 1
            elif step == "cut":
                for entry in inside:
                    entry.task = None  # it is this test
                assert registry.cut(Cut.ABORT) == 0
            elif step == "refuse":
                registry.refuse("full")
                refusing = True
            assert len(registry) == len(inside)
            idle = asyncio.ensure_future(registry.wait_idle())
            await asyncio.sleep(0)
            assert idle.done() == (not inside)
            idle.cancel()
        assert registry.outcomes[RequestOutcome.REFUSED] == refused
        assert registry.outcomes[RequestOutcome.COMPLETED] == released

    asyncio.run(main())


# --------------------------------------------------------------------------------------------------------- validated

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50)


@given(TOKENS, st.sampled_from([bytes, bytearray, memoryview]))
def test_packed_tokens_are_unpacked(tokens, kind):
    packed = struct.pack(f"<{len(tokens)}i", *tokens)
    assert validated({"token_ids": kind(packed), "model": "m"}) == {"token_ids": tokens, "model": "m"}


@given(TOKENS)
def test_a_list_of_tokens_stays_as_it_is(tokens):
    request = {"token_ids": list(tokens)}
    assert validated(request) is request
    assert request["token_ids"] == tokens


def test_packed_tokens_are_little_endian_here():
    """``array`` reads the machine's own order; all machines this runs on have the frontend's."""
    assert sys.byteorder == "little"
    assert array("i").itemsize == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.one_of(JSON, st.builds(lambda tokens: {"token_ids": tokens}, JSON)))
def test_whatever_arrives_is_valid_or_refused(request):
    """No input makes anything but an InvalidRequestError, and what passes is a list of token ids."""
    try:
        tokens = validated(request)["token_ids"]
    except InvalidRequestError:
        return
    assert isinstance(tokens, list)
    assert tokens
    assert all(type(token) is int and 0 <= token < 2**31 for token in tokens)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (["token_ids"], "expected a request object, got list"),
        ({}, "token_ids: expected a list of integers, got NoneType"),
        ({"token_ids": "abc"}, "token_ids: expected a list of integers, got str"),
        ({"token_ids": []}, "empty"),
        ({"token_ids": b""}, "empty"),
        ({"token_ids": b"12345"}, "multiple of 4"),
        ({"token_ids": [1, "2"]}, "token_ids: expected integers, got '2'"),
        ({"token_ids": [1, 2.5]}, "token_ids: expected integers, got 2.5"),
        ({"token_ids": [None]}, "token_ids: expected integers, got None"),
        ({"token_ids": [1, True]}, "token_ids: expected integers, got True"),
        ({"token_ids": [1, 2**31]}, "2147483648 is not a 32-bit integer"),
        ({"token_ids": [10**40]}, "is not a 32-bit integer"),
        ({"token_ids": [1, -2]}, "-2 is negative"),
        ({"token_ids": struct.pack("<2i", 1, -2)}, "-2 is negative"),
    ],
)
def test_a_wrong_request_is_refused_by_name(request_, message):
    with pytest.raises(InvalidRequestError, match=message):
        validated(request_)


@pytest.mark.parametrize(
    "pack", [list, lambda tokens: struct.pack(f"<{len(tokens)}i", *tokens)], ids=["list", "packed"]
)
def test_a_prompt_beyond_the_vocabulary_never_reaches_the_engine(pack):
    async def main():
        engine = FakeEngine()
        requests = RequestHandler(engine, RequestRegistry(), new_egress(), lambda error: None, TokenRequests(100))
        handler = requests.handler(EndpointSpec("generate"))
        assert [item async for item in handler({"token_ids": pack([0, 99])}, Context(id="r"))] == CHUNKS
        with pytest.raises(InvalidArgument, match="100 is not in the model's vocabulary of 100 tokens"):
            await handler({"token_ids": pack([3, 100])}, Context(id="r")).__anext__()
        assert [request for request, _ in engine.requests] == [{"token_ids": [0, 99]}]

    asyncio.run(main())


class Untouched(list):
    """Tokens that nobody may look at."""

    def __iter__(self):
        raise AssertionError("it is looked at")


@pytest.mark.parametrize("tokens", [Untouched([7] * 101), bytes(4 * 101), bytearray(4 * 101)], ids=type)
def test_a_prompt_beyond_the_context_is_not_even_looked_at(tokens):
    """32 MB fit into a message, and engines refuse it only after it was unpacked and checked."""
    with pytest.raises(InvalidRequestError, match="the prompt has 101 tokens; the model's context length is 100"):
        validated({"token_ids": tokens}, None, 100)
    assert validated({"token_ids": bytes(4 * 100)}, None, 100)["token_ids"] == [0] * 100


def test_the_context_of_the_engine_is_what_counts():
    async def main():
        engine = FakeEngine()
        requests = RequestHandler(engine, RequestRegistry(), new_egress(), lambda error: None, TokenRequests(None, 2))
        handler = requests.handler(EndpointSpec("generate"))
        assert [item async for item in handler({"token_ids": [0, 99]}, Context(id="r"))] == CHUNKS
        with pytest.raises(InvalidArgument, match="the prompt has 3 tokens"):
            await handler({"token_ids": [1, 2, 3]}, Context(id="r")).__anext__()

    asyncio.run(main())


def test_a_refusal_that_quotes_what_it_refuses_is_cut(caplog):
    """vLLM's do: a schema of 256 kB, in the log and on its way to the client."""

    class Quoting(FakeEngine):
        async def generate(self, request, context):
            raise InvalidRequestError("x" * 100_000)
            yield

    async def main():
        requests = RequestHandler(Quoting(), RequestRegistry(), new_egress(), lambda error: None, TokenRequests())
        with pytest.raises(InvalidArgument) as raised:
            await requests.handler(EndpointSpec("generate"))({"token_ids": [1]}, Context(id="r")).__anext__()
        return str(raised.value)

    assert len(asyncio.run(main())) < 1100
    assert all(len(str(vars(record))) < 5000 for record in caplog.records)


def test_a_wrong_token_is_shown_in_short():
    with pytest.raises(InvalidRequestError, match=r"expected integers, got a list of length 1000000$"):
        validated({"token_ids": [1, [1] * 10**6]})


def test_a_local_context_is_a_request_context():
    context: RequestContext = LocalContext("canary-1")
    assert (context.id(), context.is_stopped(), context.trace_headers()) == ("canary-1", False, None)


def test_an_endpoint_for_operations_takes_any_object():
    """Only endpoints that take prompts have them checked; `sleep` and the like send what they want."""

    async def main():
        engine = FakeEngine()
        requests = RequestHandler(engine, RequestRegistry(), new_egress(), lambda error: None, TokenRequests())
        handler = requests.handler(EndpointSpec("control", takes_tokens=False))
        chunks = [item async for item in handler({"level": 1}, Context(id="r"))]
        assert chunks == CHUNKS
        assert engine.requests == [({"level": 1}, "r")]

    asyncio.run(main())
