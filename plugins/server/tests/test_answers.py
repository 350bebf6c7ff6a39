"""What becomes of the answers of a server, sound and broken, and of its work when nobody waits for them."""

from __future__ import annotations

import asyncio
import resource
from typing import TYPE_CHECKING, Any

import pytest
from dynamo.llm.exceptions import Unknown

from conftest import Running
from dynamo_worker import EngineDeadError
from dynamo_worker.engine import LocalContext
from dynamo_worker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., Any]


@pytest.fixture(params=["push", "generate"], autouse=True)
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with both ways to answer."""
    monkeypatch.setattr(Running, "pushes", request.param == "push")


class Traced(LocalContext):
    def trace_headers(self) -> dict[str, str] | None:
        return {"traceparent": "00-1-2-01", "tracestate": "a\r\nX-Evil: 1"}


@pytest.mark.parametrize(
    "fault",
    ["", "crlf", "bytewise", "comments", "unframed", "interim", "no-done", "goes-on"],
    ids=lambda f: f or "none",
)
def test_an_answer_is_complete(run: Run, fault: str) -> None:
    async def check(server: Running) -> None:
        prompt = f"one two fail:{fault}" if fault else "one two"
        words = prompt.split()
        text = await server.ask(prompt)
        assert text == "".join(words[index % len(words)] + " " for index in range(6))
        reasons = [choice["finish_reason"] for chunk in server.chunks for choice in chunk["choices"]]
        assert reasons == [*[None] * 6, "length"]
        assert {chunk["model"] for chunk in server.chunks} == {"fake"}

    run(check)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("status-400", InvalidRequestError, "^no: 400$"),
        ("status-404", InvalidRequestError, "no: 404"),
        ("detail", InvalidRequestError, '"loc":'),
        ("status-429", OSError, "takes no requests .status 429.: no: 429"),
        ("status-503", OSError, "takes no requests"),
        ("status-500", Unknown, "the server has failed: no: 500"),
        ("status-401", Unknown, "refuses the worker's API key"),
        ("status-307", Unknown, "redirects to b'http://evil/', which is not followed"),
        ("html", Unknown, "<html>xxx"),
        ("long-error", InvalidRequestError, "status 400"),
        ("no-stream", Unknown, "application/json.*expected a stream"),
        ("garbage-head", OSError, "not HTTP"),
        ("endless-head", OSError, "head of the answer has more than 65536 bytes"),
        ("compressed", OSError, "compressed"),
        ("upgrade", OSError, "another protocol|not HTTP"),
    ],
)
def test_an_answer_that_does_not_begin(run: Run, fault: str, kind: type[Exception], message: str) -> None:
    async def check(server: Running) -> None:
        with pytest.raises(kind, match=message) as caught:
            await server.ask(f"fail:{fault}")
        assert len(str(caught.value)) < 1300
        assert not server.chunks
        assert await server.ask("well?", 1) == "well? "
        await server.engine.check_health()

    run(check)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("reset", OSError, "closed the connection"),
        ("cut", OSError, "closed the connection|in the middle"),
        ("bad-chunk", OSError, "not HTTP"),
        ("garbage", Unknown, "not JSON"),
        ("deep", Unknown, "not JSON"),
        ("array", Unknown, "no chunk of OpenAI"),
        ("error", Unknown, "the server has failed: out of memory"),
        ("old-error", Unknown, "the server has failed: out of memory"),
        ("endless-line", OSError, "more than 1048576 bytes"),
        ("null-choices", Unknown, "no chunk of OpenAI"),
        ("odd-choices", Unknown, "no chunk of OpenAI"),
        ("odd-reason", Unknown, "no chunk of OpenAI"),
        ("no-choices", Unknown, "no chunk of OpenAI"),
        ("surrogate", Unknown, "not JSON"),
        ("huge-chunk", OSError, "not HTTP"),
        ("endless-trailer", OSError, "the trailer of the answer has more than 65536 bytes"),
    ],
)
def test_an_answer_that_breaks_off(run: Run, fault: str, kind: type[Exception], message: str) -> None:
    """Clients get all that came before, and then an error: never an answer that looks complete."""

    async def check(server: Running) -> None:
        with pytest.raises(kind, match=message) as caught:
            await server.ask(f"a fail:{fault}")
        assert len(str(caught.value)) < 1300
        assert server.text() == f"a fail:{fault} a "
        assert await server.ask("well?", 1) == "well? "

    run(check)


@pytest.mark.parametrize("fault", ["no-end", "clean-no-end", "unframed-no-end"])
def test_an_end_without_a_finish_reason_is_no_end(run: Run, fault: str) -> None:
    async def check(server: Running) -> None:
        with pytest.raises(OSError, match=r"closed the connection|in the middle"):
            await server.ask(f"a fail:{fault}")
        assert len(server.text().split()) == 6

    run(check)


@pytest.mark.parametrize(
    ("fault", "how"), [("die", "killed by SIGKILL"), ("exit", "code 1.*\n.*illegal memory access")]
)
def test_a_death_in_mid_stream(run: Run, fault: str, how: str) -> None:
    async def check(server: Running) -> None:
        with pytest.raises(EngineDeadError, match=f"(?s){how}"):
            await server.ask(f"a fail:{fault}")
        assert server.text() == f"a fail:{fault} a "
        with pytest.raises(EngineDeadError, match=f"(?s){how}"):
            await server.engine.check_health()
        with pytest.raises(EngineDeadError):
            await server.ask()

    run(check, own=True)


@pytest.mark.parametrize(
    "fault", ["", "fail:silent", "fail:hang"], ids=["streaming", "before the head", "in the middle"]
)
def test_a_request_that_is_given_up_stops_the_work(run: Run, fault: str) -> None:
    async def check(server: Running) -> None:
        task = asyncio.ensure_future(server.ask(f"a {fault}", 10_000))
        for _ in range(100):
            await asyncio.sleep(0.02)
            stats = await server.stats()
            if stats.get("running"):
                break
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait({task})
        if fault:  # the fake server sleeps and looks at nothing
            assert await server.ask("well?", 1) == "well? "
            return
        for _ in range(100):
            await asyncio.sleep(0.02)
            stats = await server.stats()
            if not stats["running"]:
                break
        assert not stats["running"]
        assert stats["tokens"] < 10_000

    run(check, "--pause", "0.01")


def test_a_slow_client_makes_the_server_wait(run: Run) -> None:
    """One million tokens that nobody reads must not fill this process' memory; pushed ones, the worker bounds."""

    async def check(server: Running) -> None:
        request = {"model": "fake", "messages": [{"role": "user", "content": "x" * 1000}], "max_tokens": 1_000_000}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stream = server.engine.generate(request, LocalContext("slow"))
        await stream.__anext__()
        sent = -1
        for _ in range(50):
            await asyncio.sleep(0.2)
            now = (await server.stats())["tokens"]
            if now == sent:
                break
            sent = now
        else:
            pytest.fail(f"the server still sends: {sent} tokens")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
        for _ in range(20_000):
            await stream.__anext__()
        assert (await server.stats())["tokens"] > sent
        await stream.aclose()

    run(check, own=True)


def test_what_the_server_is_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name of the model, no fields of Dynamo's, and no proxy between."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    async def check(server: Running) -> None:
        assert (server.info.model_name, tuple(server.info.model_aliases)) == ("mine", ("too",))
        assert await server.ask(nvext={"a": 1}, model="too", stream=False)
        assert {chunk["model"] for chunk in server.chunks} == {"too"}

    run(check, before=("--served-model-name", "mine,too"))


def test_headers(run: Run) -> None:
    async def check(server: Running) -> None:
        request = {"model": "fake", "prompt": "a b", "max_tokens": 2}
        chunks = [c async for c in server.engine.generate(request, Traced("id\r\nX-Evil: 1"))]
        assert "".join(c["choices"][0]["text"] for c in chunks) == "a b "
        assert all({"id", "object", "created", "model"} <= chunk.keys() for chunk in chunks)
        chunks = [c async for c in server.engine.generate(request, LocalContext("r" * 100_000))]
        assert chunks

    run(check, "--bare")


@pytest.mark.parametrize(
    ("word", "reason"), [("eos_token", "stop"), ("max_tokens", "length"), ("tool_calls", "tool_calls")]
)
def test_finish_reasons(run: Run, word: str, reason: str) -> None:
    async def check(server: Running) -> None:
        await server.ask()
        assert server.chunks[-1]["choices"][0]["finish_reason"] == reason

    run(check, "--finish-reason", word)


def test_what_is_no_json(run: Run) -> None:
    async def check(server: Running) -> None:
        for value in ("\ud800", 2**70):
            with pytest.raises(InvalidRequestError, match="cannot be passed on"):
                await server.ask(user=value)

    run(check)
