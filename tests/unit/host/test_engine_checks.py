"""What a broken engine is or does is found during its start, and named."""

from __future__ import annotations

import argparse
import asyncio
import re
from dataclasses import replace

import pytest

from dynamo_worker.engine import EngineInfo
from dynamo_worker.engines.echo import EchoEngine, plugin
from dynamo_worker.errors import StartError
from dynamo_worker.host.requests.engine_checks import AnswerCheck, EngineChecks
from dynamo_worker.host.requests.token_kind import TokenRequests

INFO = EngineInfo("toy", "/models/toy")
GOOD = {"token_ids": [5], "index": 0}
LAST = {"token_ids": [6], "index": 0, "finish_reason": "stop"}


@pytest.fixture
def checks():
    return EngineChecks("engine 'toy'")


def echo():
    parser = argparse.ArgumentParser()
    plugin.add_arguments(parser)
    return EchoEngine(parser.parse_args([]))


def test_a_good_engine_passes(checks):
    engine = echo()
    checks.methods(engine)
    assert asyncio.run(checks.started(engine.start(1))).model_name == "echo"
    assert checks.pids(engine.processes()) == []
    assert checks.pids(range(7, 9)) == [7, 8]
    assert checks.canary(engine.canary_request(), TokenRequests(259).checked) == engine.canary_request()
    assert checks.mapping("control_routes", {"sleep": print}) == {"sleep": print}


class Coroutine(EchoEngine):
    async def generate(self, request, context):
        return [GOOD]


class Generator(EchoEngine):
    async def start(self, worker_id):
        yield INFO


class Silent(EchoEngine):
    abort = None


class Pushing(EchoEngine):
    async def push(self, request, context, send):
        yield GOOD


def test_a_start_that_imports_a_name_that_has_moved(checks):
    """Some engines import in `start` what takes long."""

    async def start():
        from dynamo_worker.translation import integer  # noqa: F401

    with pytest.raises(StartError, match=r"'dynamo_worker\.translation', which is 'dynamo_worker\.kit\.tr") as caught:
        asyncio.run(checks.started(start()))
    assert f"{__file__}:" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Coroutine, "generate is a coroutine function; it must return an asynchronous iterator"),
        (Generator, "start is an asynchronous generator; it must be awaitable"),
        (Silent, "it has no method 'abort'"),
        (Pushing, "push is an asynchronous generator"),
    ],
)
def test_methods_of_the_wrong_kind(checks, kind, message):
    engine = kind.__new__(kind)
    with pytest.raises(StartError, match=f"engine 'toy': {message}"):
        checks.methods(engine)


async def returned(value):
    return value


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "start: expected an EngineInfo, got None"),
        (42, "start: expected an EngineInfo, got 42"),
        (replace(INFO, model_name=None), "with model_name: expected str, got None"),
        (replace(INFO, context_length="4096"), "with context_length: expected int | None, got '4096'"),
        (replace(INFO, kv_block_size=16.0), "with kv_block_size: expected int | None, got 16.0"),
        (replace(INFO, vocab_size=True), "with vocab_size: expected int | None, got True"),
        (replace(INFO, endpoints=["side"]), "with endpoints: expected an EndpointSpec, got 'side'"),
    ],
)
def test_a_start_that_returns_something_else(checks, info, message):
    with pytest.raises(StartError) as raised:
        asyncio.run(checks.started(returned(info)))
    assert message in str(raised.value)


def test_a_start_that_is_no_coroutine(checks):
    with pytest.raises(StartError, match="start returned None, which cannot be awaited; make it `async`"):
        asyncio.run(checks.started(None))


def test_what_a_start_raises_is_not_touched(checks):
    async def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(checks.started(fail()))


@pytest.mark.parametrize("processes", [7, None, "12", [0], [-1], [True], ["7"], [7, None]], ids=repr)
def test_processes_that_are_no_pids(checks, processes):
    with pytest.raises(StartError, match="processes: expected pids, got "):
        checks.pids(processes)


@pytest.mark.parametrize("request_", [None, {}, {"token_ids": []}, {"token_ids": [300]}], ids=repr)
def test_a_canary_that_no_client_could_send(checks, request_):
    with pytest.raises(StartError, match="canary_request returned an invalid request: "):
        checks.canary(request_, TokenRequests(259).checked)


@pytest.mark.parametrize("stream", [None, [GOOD], iter([GOOD])], ids=lambda value: type(value).__name__)
def test_an_answer_that_is_no_stream(checks, stream):
    with pytest.raises(StartError, match="generate: expected an asynchronous iterator, got "):
        checks.stream(stream)


def test_an_answer_that_is_a_coroutine_is_closed(checks):
    with pytest.raises(StartError, match="generate: expected an asynchronous iterator, got <coroutine"):
        checks.stream(returned(GOOD))


@pytest.mark.parametrize("routes", [None, ["sleep"], {"sleep": "route"}, {1: print}], ids=repr)
def test_routes_that_are_no_functions(checks, routes):
    with pytest.raises(StartError, match="control_routes: expected a mapping of names to functions, got "):
        checks.mapping("control_routes", routes)


# ----------------------------------------------------------------------------------------------------------- answers


def check(checks, *chunks, vocab_size=259):
    answer = AnswerCheck(checks, vocab_size)
    for chunk in chunks:
        answer.take(chunk)
    answer.end()


@pytest.mark.parametrize(
    "chunks",
    [
        [LAST],
        [GOOD, LAST],
        [GOOD, {"token_ids": [], "finish_reason": "length"}],
        [{"token_ids": (0, 258)}, LAST],
        [{**LAST, "finish_reason": "eos"}],
        [{**LAST, "disaggregated_params": {"worker_id": 3, "blob": b"opaque"}}],
        [{**LAST, "log_probs": [-0.5], "top_logprobs": [[{"rank": 1, "token_id": 6, "token": "a", "logprob": -0.5}]]}],
    ],
    ids=str,
)
def test_good_answers(checks, chunks):
    check(checks, *chunks)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([None], "has a chunk of type NoneType, expected a dict"),
        (["text"], "has a chunk of type str, expected a dict"),
        ([{"index": 0}], "has a chunk without a list of token_ids"),
        ([{"token_ids": None}], "without a list of token_ids"),
        ([{"token_ids": 5}], "without a list of token_ids"),
        ([{"token_ids": [1.5]}], "has the token 1.5: expected an int, got float"),
        ([{"token_ids": [True]}], "has the token True: expected an int, got bool"),
        ([{"token_ids": ["a"]}], "has the token 'a': expected an int, got str"),
        ([{"token_ids": [-1]}], "has the token -1, which is not in its vocabulary of 259 tokens"),
        ([{"token_ids": [259]}], "has the token 259, which is not in its vocabulary of 259 tokens"),
        (
            [{**GOOD, "finish_reason": "done"}],
            "has the finish_reason 'done'; expected one of cancelled, content_filter",
        ),
        ([{**GOOD, "finish_reason": 1}], "has the finish_reason 1"),
        ([{**GOOD, "finish_reason": "error: no memory"}], "ended with an error: error: no memory"),
        ([{**GOOD, "finish_reason": {"error": "no memory"}}], "ended with an error: no memory"),
        ([LAST, GOOD], "continues after its finish_reason"),
        ([GOOD], "ended without a finish_reason"),
        ([], "ended without a finish_reason"),
        ([{**GOOD, "logits": object()}], "has a chunk that cannot be encoded (object is not a JSON type)"),
        ([{**GOOD, "logits": {object(): 1}}], "has a chunk that cannot be encoded"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # the same in every process
)
def test_broken_answers(checks, chunks, message):
    with pytest.raises(StartError) as raised:
        check(checks, *chunks)
    assert str(raised.value).startswith("engine 'toy': its first answer ")
    assert message in str(raised.value)


def test_without_a_vocabulary_every_id_of_dynamos_is_good(checks):
    check(checks, {**LAST, "token_ids": [2**32 - 1]}, vocab_size=None)
    with pytest.raises(StartError, match="4294967296"):
        check(checks, {**LAST, "token_ids": [2**32]}, vocab_size=None)
