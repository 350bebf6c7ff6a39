"""Requests with the prompt as text: what is refused by name, what an answer must have, what happens at its end."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import pytest
from asking import Engine, answer_of
from dynamo.llm import ModelInput
from dynamo.llm.exceptions import Disconnected, EngineShutdown, InvalidArgument, WorkerUnavailable

from dynamo_worker.engine import EngineInfo
from dynamo_worker.errors import EngineDeadError, InvalidRequestError, StartError, UsageError
from dynamo_worker.host.config.drain_mode import Cut, DrainMode
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.discovery import model_card
from dynamo_worker.host.requests.engine_checks import EngineChecks
from dynamo_worker.host.requests.frames import weight
from dynamo_worker.host.requests.kinds import kind_of, require_router
from dynamo_worker.host.requests.serving import RequestOutcome
from dynamo_worker.host.requests.text_kind import MOST_MESSAGES, TextRequests
from dynamo_worker.host.requests.token_kind import TokenRequests
from dynamo_worker.kit.canary import text_canary

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}
CHECKS = EngineChecks("engine 'toy'")
INFO = EngineInfo("toy", "/models/toy", model_input="text")


def chunk(text="a", finish_reason=None, index=0):
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


USAGE = {**chunk(), "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
WHOLE = [chunk(), chunk("b", "stop"), USAGE]


@pytest.mark.parametrize("request_", [CHAT, COMPLETION, {**COMPLETION, "prompt": [1, 2]}, text_canary("m")])
def test_a_good_request_is_passed_on_unchanged(request_):
    assert TextRequests(vocab_size=3, context_length=2).checked(request_) is request_


WRONG = [
    ([], "expected a request object, got list"),
    ({"model": "m"}, "expected messages or prompt, got neither"),
    ({**CHAT, **COMPLETION}, "expected messages or prompt, got messages and prompt"),
    ({**CHAT, "model": None}, "model: expected a text, got None"),
    ({**CHAT, "stream": "yes"}, "stream: expected true or false, got 'yes'"),
    ({**CHAT, "messages": "Hi"}, "messages: expected a list of messages, got 'Hi'"),
    ({**CHAT, "messages": []}, "messages: expected a list of messages, got a list of length 0"),
    ({**CHAT, "messages": [{"content": "Hi"}]}, r"messages\[0\]: expected an object with a role"),
    ({**CHAT, "messages": [*CHAT["messages"], 7]}, r"messages\[1\]: expected an object with a role, got 7"),
    ({**COMPLETION, "prompt": ""}, "prompt: it is empty"),
    ({**COMPLETION, "prompt": 7}, "prompt: expected a text or a list of token ids, got 7"),
    ({**COMPLETION, "prompt": []}, "prompt: the prompt is empty"),
    ({**COMPLETION, "prompt": [True]}, "prompt: expected one text or one list of token ids, got True in it"),
    ({**COMPLETION, "prompt": ["a"]}, "prompt: expected one text or one list of token ids, got 'a' in it"),
    ({**COMPLETION, "prompt": [-1]}, "prompt: -1 is negative"),
    ({**COMPLETION, "prompt": [100]}, "prompt: 100 is not in the model's vocabulary of 100 tokens"),
    ({**COMPLETION, "prompt": [1] * 51}, "the prompt has 51 tokens; the model's context length is 50"),
]


@pytest.mark.parametrize(("request_", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_request_is_refused_by_name(request_, message):
    with pytest.raises(InvalidRequestError, match=message):
        TextRequests(vocab_size=100, context_length=50).checked(request_)


def test_a_conversation_without_end_is_not_looked_at():
    with pytest.raises(InvalidRequestError, match=f"at most {MOST_MESSAGES} are accepted"):
        TextRequests().checked({**CHAT, "messages": [None] * (MOST_MESSAGES + 1)})


def test_an_api_that_is_not_served_is_refused():
    with pytest.raises(InvalidRequestError, match="prompt: the model serves requests with messages only"):
        TextRequests(["chat"]).checked(COMPLETION)


# ------------------------------------------------------------------------------------------------------------ the start


def test_the_kind_is_what_the_engine_says():
    assert isinstance(kind_of(INFO, CHECKS), TextRequests)
    assert kind_of(replace(INFO, model_input="tokens"), CHECKS).migrates


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (replace(INFO, model_input="Text"), "model_input: expected one of tokens, text, got 'Text'"),
        (replace(INFO, model_input="tensor"), "model_input: expected one of tokens, text, got 'tensor'"),
        (replace(INFO, endpoint_types=("chat", "embedding")), "chat and completions only, not for embedding"),
    ],
)
def test_a_kind_that_is_not_served_fails_the_start(info, message):
    with pytest.raises(StartError, match=message):
        kind_of(info, CHECKS)


def test_a_router_that_needs_tokens_fails_the_start():
    with pytest.raises(UsageError, match="--router-mode kv: the engine takes text"):
        require_router(INFO, "kv")
    require_router(INFO, "round-robin")
    require_router(replace(INFO, model_input="tokens"), "kv")


def test_the_model_is_registered_as_what_it_is(monkeypatch):
    calls = []

    async def record(*args, **options):
        calls.append(args[0])

    monkeypatch.setattr(model_card, "register_model", record)
    settings = WorkerSettings(engine="echo")
    for info in (replace(INFO, lora_adapters=("l",)), replace(INFO, model_input="tokens")):
        asyncio.run(model_card.register("the endpoint", info, settings))
    assert list(map(str, calls)) == list(map(str, [ModelInput.Text, ModelInput.Text, ModelInput.Tokens]))


def first_answer(*chunks, request=CHAT):
    check = TextRequests().first_answer(CHECKS, request)
    for item in chunks:
        check.take(item)
    check.end()


def test_a_good_first_answer_passes():
    first_answer(*WHOLE)
    first_answer(chunk(), chunk("b", "tool_calls"))
    text = {"index": 0, "text": "a", "finish_reason": "length"}
    first_answer({**chunk(), "object": "text_completion", "choices": [text]}, request=COMPLETION)


def without(name):
    return {key: value for key, value in chunk("a", "stop").items() if key != name}


BROKEN = [
    ("no dict", [7], "has a chunk of type int"),
    ("tokens", [{"token_ids": [1], "finish_reason": "stop"}], "has a chunk with object None"),
    ("a whole answer", [{**chunk(), "object": "chat.completion"}], ".*; a text engine answers in chunks"),
    *((name, [without(name)], f"has a chunk with {name} None") for name in ("id", "created", "model", "choices")),
    ("an index", [{**chunk(), "choices": [{"delta": {}}]}], "has a choice without an index"),
    ("a delta", [{**chunk(), "choices": [{"index": 0, "text": "a"}]}], "has a choice with delta None"),
    ("a known reason", [chunk("a", "eos")], "has the finish_reason 'eos'; expected one of content_filter, "),
    ("an end", [chunk()], "ended without a finish_reason"),
    ("an end of each", [chunk("a", "stop"), chunk("a", None, 1)], "ended without a finish_reason"),
    ("nothing after the end", [chunk("a", "stop"), chunk()], "continues after its finish_reason"),
    ("JSON", [{**chunk("a", "stop"), "x": object()}], "has a chunk that cannot be encoded"),
    ("a chunk", [], "ended without a finish_reason"),
]


@pytest.mark.parametrize(("chunks", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_first_answer_fails_the_start(chunks, message):
    with pytest.raises(StartError, match=f"engine 'toy': its first answer {message}"):
        first_answer(*chunks)


# -------------------------------------------------------------------------------------------------------------- serving


async def asked(engine, during=None, request=CHAT, kind=None):
    return await answer_of(engine, kind or TextRequests(), request, during)


@pytest.mark.parametrize("push", [False, True], ids=["generate", "push"])
def test_chunks_go_to_the_client_as_they_are(push):
    sent, error, outcome = asyncio.run(asked(Engine(*WHOLE, push=push)))
    assert (sent, error, outcome) == (WHOLE, None, RequestOutcome.COMPLETED)


@pytest.mark.parametrize("push", [False, True], ids=["generate", "push"])
@pytest.mark.parametrize("chunks", [[chunk()], [], [USAGE], [chunk("a", "stop"), chunk("b", None, 1)]])
def test_an_answer_that_just_ends_is_an_error(chunks, push):
    """The frontend would show it to the client as complete."""
    engine = Engine(*chunks, push=push)
    _, error, outcome = asyncio.run(asked(engine))
    assert outcome is RequestOutcome.FAILED
    assert isinstance(error, Disconnected)
    assert "ended without a finish_reason" in str(error)
    assert engine.aborted == ["r"]


@pytest.mark.parametrize("push", [False, True], ids=["generate", "push"])
def test_what_is_no_chunk_is_named_in_the_log(push, caplog):
    _, error, outcome = asyncio.run(asked(Engine({"token_ids": [1]}, push=push)))
    assert outcome is RequestOutcome.FAILED
    assert "the engine sent a chunk that OpenAI's API does not have: {'token_ids': [1]}" in caplog.text
    assert error is not None


def test_a_wrong_request_never_reaches_the_engine():
    engine = Engine(*WHOLE)
    _, error, outcome = asyncio.run(asked(engine, request={"model": "m"}))
    assert isinstance(error, InvalidArgument)
    assert (outcome, engine.closed) == (RequestOutcome.INVALID, 0)


@pytest.mark.parametrize(
    ("kind", "request_"), [(TextRequests(), {"token_ids": [1]}), (TokenRequests(), CHAT), (TokenRequests(), COMPLETION)]
)
def test_a_request_of_the_other_kind_goes_to_another_worker(kind, request_):
    """A frontend that knows workers of both kinds sends all of them requests of one kind (measured)."""
    _, error, outcome = asyncio.run(asked(Engine(*WHOLE), request=request_, kind=kind))
    assert (type(error), outcome) == (WorkerUnavailable, RequestOutcome.REFUSED)


def test_a_request_that_is_cut_is_not_called_handed_off():
    engine = Engine(chunk(), asyncio.Event())
    _, error, outcome = asyncio.run(asked(engine, lambda registry: registry.cut(Cut.HANDOFF)))
    assert outcome is RequestOutcome.ABORTED
    assert isinstance(error, EngineShutdown)
    assert "ended: the worker is shutting down" in str(error)
    assert (engine.closed, engine.aborted) == (1, ["r"])


def test_a_request_of_a_dead_engine_has_failed():
    _, error, outcome = asyncio.run(asked(Engine(chunk(), EngineDeadError("gone"))))
    assert (type(error), outcome) == (EngineShutdown, RequestOutcome.FAILED)


def test_the_memory_of_a_slow_clients_text_is_counted():
    """A long text weighs what it takes, 40 bytes a unit, and nothing is too deep to be weighed."""
    assert 20 < weight(chunk()) < 60
    assert weight(chunk("x" * 40_000)) - weight(chunk()) == 1000
    deep = []
    for _ in range(sys.getrecursionlimit() * 2):
        deep = [deep]
    assert weight({**chunk(), "choices": [], "x": deep}) < 100


def test_without_handoff():
    chosen = WorkerSettings(engine="echo", drain="handoff")
    assert (chosen.drain, chosen.grace_period) == (DrainMode.HANDOFF, 0)
    settings = chosen.without_handoff()
    assert (settings.drain, settings.grace_period) == (DrainMode.COMPLETE, 5)
    settings = WorkerSettings(engine="echo", drain="handoff", grace_period=2).without_handoff()
    assert (settings.drain, settings.grace_period, settings.shutdown_plan.grace) == (DrainMode.COMPLETE, 2, 2)
