"""How a request runs in an engine class, ends, and fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import engine_classes
import pytest
from dynamo.llm.exceptions import (
    CannotConnect,
    Disconnected,
    EngineShutdown,
    HttpError,
    InvalidArgument,
    StreamIncomplete,
    Unknown,
)

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.engine import LocalContext
from dynamo_worker_dynamo import answers, requests
from dynamo_worker_dynamo.answers import Answers
from dynamo_worker_dynamo.failures import translated


class Engine:
    """Answers with one token after the other until it is asked to stop, or goes wrong as told.

    :param polls: whether it asks its context whether to stop.
    :param chunks: the answer, instead of endless tokens.
    :param error: raised after the first chunk.
    """

    def __init__(self, *, polls: bool = True, chunks: list[Any] | None = None, error: BaseException | None = None):
        self.polls, self.chunks, self.error = polls, chunks, error
        self.log: list[str] = []
        self.contexts: list[Any] = []
        self.begin = asyncio.Event()
        self.begin.set()

    async def generate(self, request, context):
        self.contexts.append(context)
        try:
            await self.begin.wait()
            for chunk in self.chunks or ():
                yield chunk
            if self.error is not None:
                yield {"token_ids": [1], "index": 0}
                raise self.error
            while self.chunks is None:
                await asyncio.sleep(0.001)
                if self.polls and context.is_stopped():
                    self.log.append("stopped")
                    yield {"token_ids": [], "index": 0, "finish_reason": "cancelled"}
                    return
                yield {"token_ids": [1], "index": 0}
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        finally:
            self.log.append("closed")

    async def abort(self, context):
        self.log.append(f"abort {context.id()}")


class Case:
    def __init__(self, engine: Engine, *, decode: bool = False) -> None:
        self.engine = engine
        self.chunks: list[Any] = []
        self.died: list[EngineDeadError] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.broken: EngineDeadError | None = None
        self.answers = Answers(engine, self.beside, self.died.append, self.stays_well, decode=decode)

    async def stays_well(self) -> None:
        await asyncio.sleep(0.01)
        if self.broken is not None:
            raise self.broken

    def beside(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        return task

    def ask(self, name: str = "one") -> asyncio.Task[None]:
        return asyncio.ensure_future(self.answers.answer({"token_ids": [1]}, LocalContext(name), self.chunks.append))

    async def cancel(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
        assert task.cancelled()


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(check(), 10))  # type: ignore[arg-type]


def test_a_cancelled_request_ends_as_the_protocol_has_it() -> None:
    """The class is asked to stop and told to abort; nothing is thrown into it."""

    async def check() -> None:
        case = Case(Engine())
        task = case.ask()
        while len(case.chunks) < 3:
            await asyncio.sleep(0.001)
        await case.cancel(task)
        before = len(case.chunks)
        await case.answers.abort("one")
        assert case.engine.log == ["abort one", "stopped", "closed"]
        assert len(case.chunks) == before
        await case.answers.abort("one")
        await case.answers.abort("never seen")
        assert case.engine.log.count("abort one") == 1

    run(check)


def test_a_class_that_asks_nobody_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_PATIENCE", 0.05)

    async def check() -> None:
        case = Case(Engine(polls=False))
        task = case.ask()
        while not case.chunks:
            await asyncio.sleep(0.001)
        await case.cancel(task)
        await case.answers.abort("one")
        assert case.engine.log == ["abort one", "cancelled", "closed"]

    run(check)


def test_an_abort_without_a_cancellation_ends_the_stream() -> None:
    async def check() -> None:
        case = Case(Engine())
        task = case.ask()
        while not case.chunks:
            await asyncio.sleep(0.001)
        await case.answers.abort("one")
        await task
        assert case.chunks[-1]["finish_reason"] == "cancelled"

    run(check)


def test_an_abort_on_a_decode_worker_waits_for_the_kv_cache() -> None:
    async def check() -> None:
        case = Case(Engine(), decode=True)
        case.engine.begin.clear()
        task = case.ask()
        await asyncio.sleep(0.01)
        await case.cancel(task)
        await case.answers.abort("one")
        assert case.engine.log == []
        assert case.engine.contexts[0].is_stopped()
        case.engine.polls = False  # the first token comes all the same
        case.engine.begin.set()
        await asyncio.sleep(0.05)
        assert case.engine.log == ["abort one"]
        case.engine.polls = True
        await asyncio.wait(case.tasks)
        assert case.engine.log == ["abort one", "stopped", "closed"]

    run(check)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([{"token_ids": [1], "finish_reason": "stop"}], None),
        ([{"token_ids": [1], "finish_reason": "abort: out of blocks"}], Disconnected),
        ([{"token_ids": [1], "finish_reason": "cancelled"}], Disconnected),
        ([{"token_ids": [1], "finish_reason": "error"}], RuntimeError),
        ([{"token_ids": [1]}], StreamIncomplete),
        ([], StreamIncomplete),
    ],
    ids=lambda value: str(value[-1:]) if isinstance(value, list) else "",
)
def test_how_an_answer_ends(chunks: list[Any], expected: type[Exception] | None) -> None:
    async def check() -> None:
        case = Case(Engine(chunks=chunks))
        if expected is None:
            await case.ask()
            assert case.chunks == chunks
            return
        with pytest.raises(expected):
            await case.ask()

    run(check)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_error_that_would_end_the_event_loop(error: BaseException) -> None:
    async def check() -> None:
        with pytest.raises(RuntimeError, match="the engine class raised"):
            await Case(Engine(error=error)).ask()

    run(check)


def test_a_dead_engine_is_reported() -> None:
    async def check() -> None:
        case = Case(Engine(error=engine_classes.EngineDeadError("gone")))
        with pytest.raises(EngineDeadError, match="gone"):
            await case.ask()
        assert len(case.died) == 1

    run(check)


@pytest.mark.parametrize("broken", [True, False])
def test_an_error_that_says_nothing_may_be_the_first_sign_of_a_broken_engine(broken: bool) -> None:
    async def check() -> None:
        case = Case(Engine(error=RuntimeError("the handler is closed")))
        case.broken = EngineDeadError("a process has died") if broken else None
        with pytest.raises(EngineDeadError if broken else RuntimeError):
            await case.ask()
        assert len(case.died) == broken

    run(check)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidArgument("too long"), InvalidRequestError),
        (HttpError(422, "too long"), InvalidRequestError),
        (HttpError(503, "busy"), HttpError),
        (EngineShutdown("over"), EngineDeadError),
        (engine_classes.EngineDeadError("over"), EngineDeadError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), EngineDeadError),
        (EngineDeadError("over"), EngineDeadError),
        (InvalidRequestError("no"), InvalidRequestError),
        (Disconnected("lost"), Disconnected),
        (CannotConnect("lost"), CannotConnect),
        (Unknown("?"), Unknown),
        (ValueError("a bug"), ValueError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_errors_mean(error: Exception, kind: type[Exception]) -> None:
    found = translated(error)
    assert type(found) is kind
    assert kind in (EngineDeadError, InvalidRequestError) or found is error


def test_a_context_of_the_runtime_keeps_its_id_and_metadata() -> None:
    from dynamo.runtime import Context

    async def check() -> None:
        outer = Context("name", {"key": "value"})
        inner = answers.their_context(outer)
        inner.stop_generating()
        assert (inner.id(), inner.metadata["key"], inner.is_stopped()) == ("name", "value", True)
        assert not outer.is_stopped()

    run(check)


class TestRequests:
    """What a class gets to see."""

    def test_all_sections_are_there(self) -> None:
        given = {"token_ids": [1, 2], "sampling_options": None, "stop_conditions": {"max_tokens": 5}}
        prepared = requests.ClassTable(None).translate(given)
        assert prepared == {
            "token_ids": [1, 2],
            "sampling_options": {},
            "stop_conditions": {"max_tokens": 5},
            "output_options": {},
        }
        assert prepared["stop_conditions"] is not given["stop_conditions"]

    @pytest.mark.parametrize(("given", "expected"), [(None, None), (5, 5), (5000, 8)])
    def test_the_token_limit_fits_the_context(self, given: int | None, expected: int | None) -> None:
        request = {"token_ids": [1, 2], "stop_conditions": {"max_tokens": given}}
        prepared = requests.ClassTable(10).translate(request)
        assert prepared is not None
        assert prepared["stop_conditions"]["max_tokens"] == expected

    def test_no_tokens(self) -> None:
        assert requests.ClassTable(10).translate({"token_ids": [1], "stop_conditions": {"max_tokens": 0}}) is None

    @pytest.mark.parametrize(
        "request_",
        [
            {"token_ids": [1] * 10},
            {"token_ids": [1], "sampling_options": {"temperature": "hot"}},
            {"token_ids": [1], "sampling_options": {"guided_decoding": {"regex": 7}}},
            {"token_ids": [1], "sampling_options": {"no_such_option": 1}},
            {"token_ids": [1], "extra_args": {"sampling_options": {"logit_bias": 3}}},
            {"token_ids": [1], "sampling_options": {"seed": 5}},
            {"token_ids": [1], "extra_args": {"sampling_options": {"n": 2}}},
        ],
    )
    def test_wrong_and_refused_fields(self, request_: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError):
            requests.ClassTable(10, ("n", "seed")).translate(request_)

    def test_refused_fields_may_ask_for_nothing(self) -> None:
        request = {"token_ids": [1], "sampling_options": {"n": 1, "seed": None, "guided_decoding": {}}}
        assert requests.ClassTable(10, ("n", "seed", "guided_decoding")).translate(request) is not None
