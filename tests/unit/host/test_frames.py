"""Chunks that wait together become one frame, and nothing is lost."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker.host.frames import joined, weight

TOKENS = st.lists(st.integers(0, 1000), max_size=4)


def token(number, **more):
    return {"token_ids": [number], "index": 0, **more}


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
