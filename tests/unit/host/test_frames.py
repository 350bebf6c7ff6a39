"""Chunks that wait together become one frame, and nothing is lost."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker.host.requests.frames import joined, weight

TOKENS = st.lists(st.integers(0, 1000), max_size=4)


def token(number, **more):
    return {"token_ids": [number], "index": 0, **more}


VALUES = st.none() | st.integers() | st.text(max_size=2)
#: What an engine of somebody else's may say, right or wrong.
LISTS = VALUES | st.lists(VALUES | st.floats() | st.lists(st.dictionaries(st.text(max_size=2), VALUES), max_size=2))
ANY_CHUNK = st.dictionaries(
    st.sampled_from(["token_ids", "log_probs", "top_logprobs", "index", "finish_reason", "text"]), LISTS
)


@given(chunks=st.lists(ANY_CHUNK | ANY_CHUNK.map(lambda chunk: {**chunk, "token_ids": [1]}), min_size=1))
def test_whatever_an_engine_says_is_passed_on(chunks):
    """A chunk that the runtime cannot encode is its request's affair; nothing of it may end the thread that sends."""
    waiting, taken = deque(chunks), 0
    while waiting:
        frame, count = joined(waiting)
        assert weight(frame) > 0
        if count == 1:
            assert frame == chunks[taken]
        taken += count
    assert taken == len(chunks)


def test_values_that_are_not_given_may_be_left_out_or_none():
    chunks = [token(1), token(2, log_probs=None), token(3, top_logprobs=None, finish_reason="stop")]
    frame, count = joined(deque(chunks))
    assert frame["token_ids"][:2] == [1, 2]
    assert count >= 2


@st.composite
def chunks(draw):
    tokens = draw(TOKENS)
    chunk = {"token_ids": tokens, "index": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        chunk["log_probs"] = [-float(number) for number in tokens]
    if draw(st.booleans()):
        chunk["top_logprobs"] = [[{"token_id": number}] for number in tokens]
    if draw(st.booleans()):
        chunk["finish_reason"] = "stop"
    if draw(st.booleans()):
        chunk["disaggregated_params"] = {"room": 1}
    return chunk


@settings(max_examples=300)
@given(st.lists(chunks(), min_size=1, max_size=8))
def test_joining_keeps_everything(parts):
    waiting = deque(parts)
    frames = []
    while waiting:
        frame, count = joined(waiting)
        frames.append((frame, parts[:count]))
        parts = parts[count:]
    assert not parts
    for frame, group in frames:
        for name in ("token_ids", "log_probs", "top_logprobs"):
            assert all((name in chunk) == (name in frame) for chunk in group)
            if name in frame:
                assert frame[name] == [value for chunk in group for value in chunk[name]]
        *before, last = group
        rest = {key: value for key, value in last.items() if key not in ("token_ids", "log_probs", "top_logprobs")}
        assert {key: frame[key] for key in rest} == rest
        assert all(chunk["index"] == last["index"] for chunk in before)
        assert all(chunk.keys() <= {"token_ids", "index", "log_probs", "top_logprobs"} for chunk in before)
        assert weight(frame) - weight({}) == sum(weight(chunk) - weight({}) for chunk in group)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (token(1), {"token_ids": [2], "index": 1}),
        (token(1, finish_reason="stop"), token(2)),
        (token(1, disaggregated_params={}), token(2)),
        (token(1, log_probs=[-1.0]), token(2)),
        (token(1), token(2, log_probs=[-1.0])),
        (token(1), {"index": 0}),
        ({"sleeping": True}, {"sleeping": False}),
        (token(1), {"token_ids": b"\x01\x00\x00\x00", "index": 0}),
        ({"token_ids": b"\x01\x00\x00\x00", "index": 0}, token(1)),
    ],
)
def test_what_cannot_be_said_in_one_chunk_stays_two(first, second):
    assert joined(deque([first, second])) == (first, 1)


def test_the_last_chunk_takes_the_tokens_before_it():
    last = token(2, finish_reason="stop", completion_usage={"total_tokens": 2})
    assert joined(deque([token(1), last])) == ({**last, "token_ids": [1, 2]}, 2)


def test_frames_with_alternatives_are_short():
    """Encoding them takes long, with the interpreter locked."""
    waiting = deque(token(1, log_probs=[-1.0], top_logprobs=[[{"token_id": 1}] * 20]) for _ in range(40))
    assert [joined(waiting)[1] for _ in range(3)] == [16, 16, 8]
