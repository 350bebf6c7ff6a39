"""The engine's process from within: requests and aborts on their way to transformers' loop and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_batches import GREEDY, settings

from dynamo_worker.testing.tiny_model import make
from dynamo_worker_transformers.core import Core

Sent = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    core = Core()
    core.start(settings(make(tmp_path_factory.mktemp("model"))))
    try:
        yield core
    finally:
        core.close()


@pytest.fixture
def core(started: Core, monkeypatch: pytest.MonkeyPatch) -> Core:
    sent: Sent = []
    monkeypatch.setattr(started, "send", lambda name, chunk, *, last: sent.append((name, chunk)), raising=False)
    monkeypatch.setattr(started, "sent", sent, raising=False)
    return started


def payload(limit: int, **given: Any) -> dict[str, Any]:
    return {
        "token_ids": [7, 8, 9], "n": 1, "max_tokens": limit, "ends": [], "stop_token_ids": [], "sampling": GREEDY,
        "adapter": None, **given,
    }  # fmt: skip


def made(core: Any, name: str) -> list[int]:
    """Step until a request has ended; return its tokens."""
    until = time.monotonic() + 60
    while name in core._requests:
        assert time.monotonic() < until, f"{name} gets no more than {core.sent}"
        core.step()
    return [token for to, chunk in core.sent if to == name for token in chunk["token_ids"]]


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_an_abort_on_its_way_ends_no_later_request_of_its_id(core: Any) -> None:
    """The loop reads the abort and the request at once, and reads requests first."""
    core.add("plain", payload(5))
    right = made(core, "plain")
    core.add("same", payload(900))
    core.step()
    with core._batches.at_rest():
        core.abort("same")
        core.sent.clear()
        core.add("same", payload(5))
    assert made(core, "same") == right
    wait(lambda: core._batches.used_blocks() == 0)


def test_what_the_loop_had_done_for_an_aborted_request_reaches_no_later_one(core: Any) -> None:
    """After an abort nothing is in progress, so nobody reads what the loop has reported until the next request."""
    core.add("plain", payload(5))
    right = made(core, "plain")
    core.add("same", payload(900))
    core.step()
    wait(lambda: core._batches._manager.output_router.output_queue.qsize() > 2)
    core.abort("same")
    core.sent.clear()
    core.add("same", payload(5))
    assert made(core, "same") == right
    wait(lambda: core._batches.used_blocks() == 0)


def test_of_a_request_that_cannot_begin_nothing_stays(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second answer cannot."""
    add, left = core._batches.add, [1]

    def once(*arguments: Any) -> None:
        if not left:
            raise MemoryError("no more answers")
        left.pop()
        add(*arguments)

    monkeypatch.setattr(core._batches, "add", once)
    with pytest.raises(MemoryError):
        core.add("two", payload(900, n=2))
    assert not core._requests
    assert not core._answers
    assert not core._batches._running
    wait(lambda: core._batches.used_blocks() == 0)
