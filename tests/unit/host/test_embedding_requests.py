"""Requests for embeddings: both forms of frontends, what is refused by name, and what an answer must have."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import sys
from dataclasses import replace

import pytest
from asking import Engine, answer_of
from dynamo.llm.exceptions import Disconnected, EngineShutdown, InvalidArgument, Unknown

from dynamo_worker.embeddings import EmbeddingSpec
from dynamo_worker.engine import EngineInfo
from dynamo_worker.errors import InvalidRequestError, StartError, UsageError
from dynamo_worker.host.config.drain_mode import Cut
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.discovery import model_card
from dynamo_worker.host.requests import embedding_kind
from dynamo_worker.host.requests.embedding_kind import EmbeddingRequests
from dynamo_worker.host.requests.engine_checks import EngineChecks
from dynamo_worker.host.requests.frames import weight
from dynamo_worker.host.requests.kinds import kind_of, require_router
from dynamo_worker.host.requests.serving import RequestOutcome
from dynamo_worker.host.requests.text_kind import TextRequests
from dynamo_worker.host.requests.token_kind import TokenRequests

CHECKS = EngineChecks("engine 'toy'")
SPEC = EmbeddingSpec(2, shorter=True, most_inputs=3)
INFO = EngineInfo("toy", "/models/toy", endpoint_types=("embedding",), embeddings=SPEC, vocab_size=10, context_length=4)
TOKENS = EmbeddingRequests(SPEC, INFO)
TEXT = EmbeddingRequests(SPEC, replace(INFO, model_input="text"))
#: As frontends of 1.6.1 send them (measured).
TOKENIZED = {"token_ids": [[1], [2, 3]], "model": "m", "dimensions": None, "mdc_sum": "6a80", "annotations": []}
BODY = {"model": "m", "input": ["a", "bc"], "encoding_format": "base64"}


@pytest.mark.parametrize(
    ("kind", "request_", "inputs"),
    [
        (TOKENS, TOKENIZED, [[1], [2, 3]]),
        (TOKENS, {**TOKENIZED, "token_ids": [struct.pack("<2i", 8, 9)]}, [[8, 9]]),
        (TEXT, BODY, ["a", "bc"]),
        (TEXT, {**BODY, "input": "abc"}, ["abc"]),
        (TEXT, {**BODY, "input": [1, 2]}, [[1, 2]]),
        (TEXT, {**BODY, "input": [[1, 2], [3]]}, [[1, 2], [3]]),
        (TOKENS, {"model": "m", "inputs": [[1]]}, [[1]]),
    ],
)
def test_engines_get_one_form(kind, request_, inputs):
    checked = kind.checked(request_)
    assert checked == {"model": "m", "inputs": inputs}
    assert kind.checked(checked) == checked, "the canary is checked in the form that it has"


def test_what_the_client_says_about_vectors_and_texts_is_passed_on():
    said = {"dimensions": 1, "truncate_prompt_tokens": -1, "add_special_tokens": False}
    assert TEXT.checked({**BODY, **said}) == {"model": "m", "inputs": ["a", "bc"], **said}
    # The frontend has truncated what it tokenized.
    assert "truncate_prompt_tokens" not in TOKENS.checked({**TOKENIZED, "truncate_prompt_tokens": 2})
    assert "dimensions" not in TOKENS.checked({**TOKENIZED, "dimensions": 2}), "that many there are anyway"


WRONG = [
    (TEXT, [], "expected a request object, got list"),
    (TEXT, {"input": "a"}, "model: expected a text, got None"),
    (TEXT, {"model": "m"}, "input: it is missing"),
    (TEXT, {**BODY, "input": 7}, "input: expected a text, a list of texts, token ids or a list of lists"),
    (TEXT, {**BODY, "input": []}, "input: it is empty"),
    (TEXT, {**BODY, "input": ""}, r"input\[0\]: it is empty"),
    (TEXT, {**BODY, "input": ["a", ""]}, r"input\[1\]: it is empty"),
    (TEXT, {**BODY, "input": ["a", 7]}, r"input\[1\]: expected a list of integers, got int"),
    (TEXT, {**BODY, "input": [1, True]}, r"input\[0\]: expected integers, got True"),
    (TEXT, {**BODY, "input": [1, 10]}, r"input\[0\]: 10 is not in the model's vocabulary of 10 tokens"),
    (TEXT, {**BODY, "input": ["a"] * 4}, "input: 4 inputs are too many, at most 3 are accepted"),
    (TEXT, {**BODY, "encoding_format": "hex"}, "encoding_format: expected float or base64, got 'hex'"),
    (TEXT, {**BODY, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens: expected a number from 1, or -1, got 0"),
    (TEXT, {**BODY, "truncate_prompt_tokens": True}, "truncate_prompt_tokens: expected a number from 1"),
    (TEXT, {**BODY, "add_special_tokens": 1}, "add_special_tokens: expected true or false, got 1"),
    (TOKENS, BODY, r"input\[0\]: this worker takes tokens, and the input is text"),
    (TOKENS, {**TOKENIZED, "token_ids": [[]]}, r"input\[0\]: it is empty"),
    (TOKENS, {**TOKENIZED, "token_ids": [[1], [1] * 5]}, r"input\[1\] has 5 tokens; the model's context length is 4"),
    (TOKENS, {**TOKENIZED, "token_ids": [[-1]]}, r"input\[0\]: -1 is negative"),
    (TOKENS, {**TOKENIZED, "dimensions": 0}, "dimensions: expected a number from 1 to 2, got 0"),
    (TOKENS, {**TOKENIZED, "dimensions": True}, "dimensions: expected a number from 1 to 2, got True"),
    (TOKENS, {**TOKENIZED, "dimensions": 3}, "dimensions: 3 are too many, the model's embeddings have 2"),
    (TOKENS, {"model": "m", "token_ids": [1, 2]}, "this worker makes embeddings, and the request asks for generated"),
    (TEXT, {"model": "m", "messages": [{}]}, "this worker makes embeddings, and the request asks for a chat"),
    (TEXT, {"model": "m", "prompt": "a"}, "this worker makes embeddings, and the request asks for a completion"),
    (TEXT, {"model": "m", "query": "a"}, "this worker makes embeddings, and the request asks for a ranking"),
]


@pytest.mark.parametrize(("kind", "request_", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_no_engine_could_use_is_refused_by_name(kind, request_, message):
    with pytest.raises(InvalidRequestError, match=message):
        kind.checked(request_)


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        (TokenRequests(), {"model": "m", "input": "a"}, "this worker generates tokens, and the request asks for embed"),
        (TokenRequests(), TOKENIZED, "this worker generates tokens, and the request asks for embeddings"),
        (TextRequests(), BODY, "this worker generates text, and the request asks for embeddings"),
    ],
)
def test_engines_that_generate_refuse_it_by_name(kind, request_, message):
    with pytest.raises(InvalidRequestError, match=message):
        kind.checked(dict(request_))


@pytest.mark.parametrize(
    ("shorter", "message"),
    [
        (False, "dimensions: the model's embeddings have 8 dimensions, always"),
        ((), "dimensions: the model's embeddings have 8 dimensions, always"),
        ([4, 2], "dimensions: the model's embeddings can have 2, 4, 8 dimensions, not 3"),
    ],
)
def test_a_model_says_how_short_its_vectors_can_be(shorter, message):
    kind = EmbeddingRequests(EmbeddingSpec(8, shorter), INFO)
    with pytest.raises(InvalidRequestError, match=message):
        kind.checked({**TOKENIZED, "dimensions": 3})
    assert "dimensions" not in kind.checked({**TOKENIZED, "dimensions": 8})
    if shorter:
        assert kind.checked({**TOKENIZED, "dimensions": 2})["dimensions"] == 2


def test_what_all_inputs_take_together_is_limited(monkeypatch):
    monkeypatch.setattr(embedding_kind, "MOST_TOKENS", 5)
    monkeypatch.setattr(embedding_kind, "MOST_CHARACTERS", 5)
    monkeypatch.setattr(embedding_kind, "MOST_ANSWER_BYTES", 16)
    for kind, one in ((TOKENS, [1, 1, 1]), (TEXT, "abc")):
        assert kind.checked({"model": "m", "input": [one]})
        with pytest.raises(InvalidRequestError, match=r"input: more than 5 (tokens|characters) in one request"):
            kind.checked({"model": "m", "input": [one, one]})
    with pytest.raises(InvalidRequestError, match="3 inputs are too many for one answer, at most 2 with 2 dimensions"):
        TEXT.checked({"model": "m", "input": ["a", "b", "c"]})
    assert TEXT.checked({"model": "m", "input": ["a", "b", "c"], "dimensions": 1})


def vector(*numbers):
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


ANSWER = {"embeddings": [[0.5, -1], struct.pack("<2f", 0.1, 3e38)], "prompt_tokens": 3}


@pytest.mark.parametrize("push", [False, True], ids=["generate", "push"])
def test_answers_have_the_form_of_the_frontends_request(push):
    sent, error, outcome = asyncio.run(answer_of(Engine(ANSWER, push=push), TOKENS, TOKENIZED))
    encoded = [vector(0.5, -1), vector(0.1, 3e38)]
    assert (sent, error) == ([{"embeddings": encoded, "prompt_tokens": 3, "total_tokens": 3}], None)
    assert outcome is RequestOutcome.COMPLETED
    sent, *_ = asyncio.run(answer_of(Engine(ANSWER, push=push), TEXT, BODY))
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(encoded)]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    assert sent == [{"object": "list", "data": data, "model": "m", "usage": usage}]


BAD = [
    ("[1]", [1], "is a list, expected a dict with embeddings and prompt_tokens"),
    ("no count", {"embeddings": ANSWER["embeddings"]}, "has prompt_tokens None: expected a number of tokens"),
    ("a count of true", {**ANSWER, "prompt_tokens": True}, "has prompt_tokens True"),
    ("no vectors", {"prompt_tokens": 1}, "has embeddings of type NoneType: expected a list of vectors"),
    ("one too few", {**ANSWER, "embeddings": [[1, 2]]}, "has 1 embeddings for 2 inputs"),
    ("too short", {**ANSWER, "embeddings": [[1, 2], [1]]}, "has the embedding 1 with 1 dimensions; expected 2"),
    ("too few bytes", {**ANSWER, "embeddings": [b"1234", [1, 2]]}, "the embedding 0 with 4 bytes; expected 2 floats"),
    ("text", {**ANSWER, "embeddings": ["ab", [1, 2]]}, "has the embedding 0 of type str: expected numbers"),
    (
        "not a number",
        {**ANSWER, "embeddings": [[1, 2], [1, math.nan]]},
        "the embedding 1 with a number that is not fin",
    ),
    ("endless", {**ANSWER, "embeddings": [struct.pack("<2f", 1, -math.inf), [1, 2]]}, "embedding 0 with a number that"),
    (
        "no float",
        {**ANSWER, "embeddings": [[1, None], [1, 2]]},
        "the embedding 0 with a number that is no 32-bit float",
    ),
    ("too large", {**ANSWER, "embeddings": [[1, 1e39], [1, 2]]}, "the embedding 0 with a number that is no 32-bit flo"),
]


@pytest.mark.parametrize(("answer", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
@pytest.mark.parametrize("kind", [TOKENS, TEXT], ids=["tokens", "text"])
def test_a_wrong_answer_is_an_error_and_never_reaches_the_client(kind, answer, message, caplog):
    request = TOKENIZED if kind is TOKENS else BODY
    sent, error, outcome = asyncio.run(answer_of(Engine(answer), kind, request))
    assert (sent, type(error), outcome) == ([], Unknown, RequestOutcome.FAILED)
    assert message in caplog.text.replace("\\'", "'")
    check = kind.first_answer(CHECKS, kind.checked(dict(request)))
    with pytest.raises(StartError, match=r"engine 'toy': its first answer .*" + message[:30].replace("[", r"\[")):
        check.take(answer)


@pytest.mark.parametrize("push", [False, True], ids=["generate", "push"])
def test_an_engine_answers_once(push, caplog):
    """The frontend would show no answer as an empty list with HTTP 200, and answer two with HTTP 500 (measured)."""
    sent, error, outcome = asyncio.run(answer_of(Engine(push=push), TEXT, BODY))
    assert (sent, type(error), outcome) == ([], Disconnected, RequestOutcome.FAILED)
    sent, error, outcome = asyncio.run(answer_of(Engine(ANSWER, ANSWER, push=push), TEXT, BODY))
    assert (sent, outcome) == ([], RequestOutcome.FAILED)
    assert "the engine answered a request for embeddings twice" in caplog.text
    check = TEXT.first_answer(CHECKS, TEXT.checked(BODY))
    with pytest.raises(StartError, match="its first answer ended without embeddings"):
        check.end()
    check.take(ANSWER)
    check.end()
    with pytest.raises(StartError, match="its first answer has two chunks; embeddings come in one"):
        check.take(ANSWER)


def test_other_requests_go_on_while_a_large_answer_is_encoded(monkeypatch):
    monkeypatch.setattr(embedding_kind, "_SLICE_BYTES", 8)
    turns = 0

    async def main():
        nonlocal turns

        async def beside():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.ensure_future(beside())
        request = {"model": "m", "inputs": [[1]] * 100}
        await TOKENS._encoded(request, {"embeddings": [[1, 2]] * 100, "prompt_tokens": 1})
        other.cancel()

    asyncio.run(main())
    assert turns >= 90


def test_a_wrong_request_is_a_400_and_never_reaches_the_engine():
    engine = Engine(ANSWER)
    _, error, outcome = asyncio.run(answer_of(engine, TEXT, {**BODY, "input": []}))
    assert (type(error), outcome, engine.closed) == (InvalidArgument, RequestOutcome.INVALID, 0)
    assert str(error) == "input: it is empty"


def test_a_request_that_is_cut_is_not_called_handed_off():
    """No frontend sends it to a second worker."""

    engine = Engine(asyncio.Event())
    _, error, outcome = asyncio.run(answer_of(engine, TEXT, BODY, lambda registry: registry.cut(Cut.HANDOFF)))
    assert (type(error), outcome) == (EngineShutdown, RequestOutcome.ABORTED)
    assert (engine.closed, engine.aborted) == (1, ["r"])


def test_the_kind_follows_from_the_engines_information():
    assert isinstance(kind_of(INFO, CHECKS), EmbeddingRequests)
    assert not kind_of(INFO, CHECKS).migrates
    with pytest.raises(StartError, match="it makes embeddings, which are served for embedding only, not for chat"):
        kind_of(replace(INFO, endpoint_types=("chat",)), CHECKS)
    with pytest.raises(UsageError, match="--router-mode kv: the engine makes embeddings"):
        require_router(INFO, "kv")
    require_router(INFO, "round-robin")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("yes", "embeddings: expected an EmbeddingSpec, got 'yes'"),
        (EmbeddingSpec(0), "an EmbeddingSpec with dimensions: expected 1 or more, got 0"),
        (EmbeddingSpec(1.5), "an EmbeddingSpec with dimensions: expected 1 or more, got 1.5"),
        (EmbeddingSpec(8, most_inputs=0), "an EmbeddingSpec with most_inputs: expected 1 or more, got 0"),
        (
            EmbeddingSpec(8, [4, 9]),
            r"an EmbeddingSpec with shorter: expected True, or numbers from 1 to 8, got \[4, 9\]",
        ),
        (EmbeddingSpec(8, 4), "an EmbeddingSpec with shorter: expected True, or numbers from 1 to 8, got 4"),
    ],
)
def test_what_an_engine_says_of_its_vectors_is_checked(spec, message):
    async def start():
        return replace(INFO, embeddings=spec)

    with pytest.raises(StartError, match=message):
        asyncio.run(CHECKS.started(start()))


def test_an_operator_cannot_make_an_engine_do_what_it_does_not():
    settings = WorkerSettings(engine="toy", endpoint_types=("chat",))
    with pytest.raises(UsageError, match="'chat' cannot be served: the engine makes embeddings") as caught:
        model_card.check_endpoint_types(INFO, settings, CHECKS.problem)
    assert "rerank" in str(caught.value.hint).lower()
    model_card.check_endpoint_types(INFO, WorkerSettings(engine="toy"), CHECKS.problem)
    with pytest.raises(StartError, match="'rerank' cannot be served"):
        model_card.check_endpoint_types(
            replace(INFO, endpoint_types=("rerank",)), WorkerSettings(engine="toy"), CHECKS.problem
        )


def test_the_memory_of_a_slow_clients_embeddings_is_counted():
    small, large = ({"embeddings": ["x" * size], "prompt_tokens": 1} for size in (40, 40_000))
    assert weight(large) - weight(small) == 999
    assert sys.getsizeof(large["embeddings"][0]) < 40 * weight(large) < 60_000
