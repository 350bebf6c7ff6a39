"""Clients see exactly what came over the wire, over a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import pytest
from aiohttp import web

from dynamo_worker.testing.client import Load, Result, chat
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.waiting import eventually


def event(text=None, finish_reason=None):
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}, 'finish_reason': finish_reason}]})}\n\n"


DONE = "data: [DONE]\n\n"


@contextlib.contextmanager
def frontend(*parts, status=200, abort=False, hold=None):
    """Serve a fixed answer to every request, in a thread with a loop of its own; yield its URL and what was asked."""
    asked = []
    started, stop = threading.Event(), None
    loop = asyncio.new_event_loop()
    port = free_port()

    async def answer(request):
        asked.append(await request.json())
        if status != 200:
            return web.Response(status=status, text="".join(parts))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part.encode())
        while hold is not None and not hold.is_set():
            await asyncio.sleep(0.005)
        if abort:
            request.transport.abort()
        return response

    async def serve():
        nonlocal stop
        stop = asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{port}", asked
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def ask(url, count=1):
    return Load(url, [chat("echo", f"Hi {number}", 5) for number in range(count)]).wait(20)


def test_a_stream_that_ends_as_it_should():
    with frontend(event("Hel"), ":\n\n", event("lo"), event(None, "stop"), DONE) as (url, asked):
        (result,) = ask(url)
    assert result.ok
    assert (result.status, result.text, result.finish_reason) == (200, "Hello", "stop")
    assert len(result.chunk_times) == 2
    assert asked == [
        {"model": "echo", "messages": [{"role": "user", "content": "Hi 0"}], "stream": True, "max_tokens": 5}
    ]


def test_completions_have_their_text_elsewhere():
    line = f"data: {json.dumps({'choices': [{'text': 'abc', 'finish_reason': 'length'}]})}\n\n"
    with frontend(line, DONE) as (url, _):
        (result,) = ask(url)
    assert (result.text, result.finish_reason) == ("abc", "length")


def test_a_chunk_with_usage_only_is_no_error():
    usage = f"data: {json.dumps({'choices': [], 'usage': {'total_tokens': 3}})}\n\n"
    with frontend(event("a", "stop"), usage, DONE) as (url, _):
        assert ask(url)[0].ok


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([event("a"), "event: error\n: worker gone\n\n"], "error"),
        ([event("a"), 'data: {"error": {"message": "worker gone"}}\n\n'], "worker gone"),
        ([event("a"), "data: {torn\n\n"], "JSONDecodeError"),
        ([event("a"), "data: " + "x" * 1_000_000 + "\n\n"], ""),  # each version of aiohttp has its own name for it
    ],
    ids=["error event", "error object", "torn", "endless line"],
)
def test_an_error_in_the_stream_is_seen(parts, message):
    with frontend(*parts, event("b", "stop"), DONE) as (url, _):
        (result,) = ask(url)
    assert not result.ok
    assert result.error
    assert message in result.error


def test_a_stream_without_a_finish_reason_is_not_complete():
    with frontend(event("Hel")) as (url, _):
        (result,) = ask(url)
    assert result.error is None
    assert not result.ok


def test_a_connection_that_breaks_is_seen():
    with frontend(event("Hel"), abort=True) as (url, _):
        (result,) = ask(url)
    assert not result.ok
    assert result.text == "Hel"
    assert result.error


def test_an_http_error_is_seen_with_its_text():
    with frontend("n must be 1", status=400) as (url, _):
        (result,) = ask(url)
    assert (result.status, result.error) == (400, "n must be 1")
    assert not result.ok


def test_an_error_without_a_text_has_started_and_ended():
    with frontend(status=404) as (url, _):
        load = Load(url, [chat("echo", "Hi", 5)])
        assert load.wait(20)[0].error == ""
    assert load.started()


def test_nobody_listening():
    (result,) = ask(f"http://127.0.0.1:{free_port()}")
    assert result.status == 0
    assert "Connect" in result.error


def test_many_streams_each_with_its_own_result():
    with frontend(event("x"), event(None, "stop"), DONE) as (url, asked):
        results = ask(url, 200)
    assert all(result.ok and result.text == "x" for result in results)
    assert {body["messages"][0]["content"] for body in asked} == {f"Hi {number}" for number in range(200)}


def test_a_load_runs_beside_the_test():
    hold = threading.Event()
    with frontend(event("x"), hold=hold) as (url, _):
        load = Load(url, [chat("echo", "Hi", None)] * 3)
        eventually(load.started)
        try:
            with pytest.raises(AssertionError, match=r"still running after 0\.05 s: 0 of 3 complete"):
                load.wait(0.05)
        finally:
            hold.set()  # or the server would never end
        assert len(load.wait(10)) == 3


def test_the_summary_names_each_error_once():
    load = Load("http://127.0.0.1:9", [])
    load.wait()
    load.results = [Result(200, "a", "stop"), Result(500, error="gone"), Result(500, error="gone")]
    assert load.summary() == "1 of 3 complete; errors: ['gone']"


def test_chat_without_a_limit():
    assert "max_tokens" not in chat("m", "p", None)
    assert chat("m", "p", 0, temperature=0.5) == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "stream": True,
        "temperature": 0.5,
        "max_tokens": 0,
    }
