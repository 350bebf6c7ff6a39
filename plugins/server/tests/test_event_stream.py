"""Server-sent events, however they arrive."""

from __future__ import annotations

import time

import pytest

from dynamo_worker_server.event_stream import MOST_BYTES, EventStream, EventStreamError

STREAM = (
    b': ping\n\ndata: {"a": 1}\n\nid: 3\ndata:{"b":\r\ndata: 2}\r\n\r\nevent: x\n\nerror: {"c": 3}\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"a": 1}', b'{"b":\n2}', b'{"error":{"c": 3}}', b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(STREAM)])
def test_parts_of_any_size(size: int) -> None:
    stream = EventStream()
    parts = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [event for part in parts for event in stream.feed(part)] == EVENTS


def test_one_event_a_part() -> None:
    stream = EventStream()
    assert [event for _ in range(3) for event in stream.feed(b"data: {}\n\n")] == [b"{}"] * 3
    assert stream.feed(b"data: 1\n\ndata: 2\n\n") == [b"1", b"2"]


@pytest.mark.parametrize("part", [b"x" * 1000, b"data: x\n" * 100], ids=["line", "event"])
def test_an_endless_event_ends(part: bytes) -> None:
    stream = EventStream()

    def feed() -> None:
        for _ in range(2 * MOST_BYTES // len(part)):
            stream.feed(part)

    with pytest.raises(EventStreamError, match="1048576 bytes"):
        feed()


def test_a_line_that_comes_byte_by_byte_is_cheap() -> None:
    stream = EventStream()
    started = time.process_time()
    for _ in range(300_000):
        stream.feed(b"x")
    assert time.process_time() - started < 3.0
