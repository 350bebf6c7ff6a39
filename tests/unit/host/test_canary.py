"""The worker's own requests: their chunks are progress, and one that is given up is aborted."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_worker.errors import StartError
from dynamo_worker.host.requests.canary import Canary
from dynamo_worker.host.requests.engine_checks import EngineChecks
from dynamo_worker.host.requests.serving import RequestRegistry
from dynamo_worker.host.requests.token_kind import TokenRequests

ANSWER = [{"token_ids": [1]}, {"token_ids": [2], "finish_reason": "stop"}]


class Engine:
    def __init__(self, chunks=ANSWER, *, hangs=False):
        self.chunks, self.hangs = chunks, hangs
        self.asked, self.aborted = [], []

    def canary_request(self):
        return {"token_ids": [7]}

    async def generate(self, request, context):
        self.asked.append((request, context.id()))
        for chunk in self.chunks:
            yield chunk
        if self.hangs:
            await asyncio.Event().wait()

    async def abort(self, request_id):
        self.aborted.append(request_id)


def canary(engine):
    requests = RequestRegistry()
    return Canary(engine, engine.canary_request, requests), requests


def test_its_chunks_are_progress_but_it_is_not_in_flight():
    engine = Engine()
    sender, requests = canary(engine)
    asyncio.run(sender.send())
    ((request, request_id),) = engine.asked
    assert request == engine.canary_request()
    assert request_id.startswith("canary-")
    assert requests.chunks == 2
    assert sum(requests.outcomes.values()) == len(requests) == 0
    assert engine.aborted == []


def test_one_that_is_given_up_is_aborted():
    engine = Engine(hangs=True)
    sender, requests = canary(engine)

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sender.send(), 0.05)

    asyncio.run(main())
    assert engine.aborted == [engine.asked[0][1]]
    assert requests.chunks == 2


def test_an_abort_that_fails_hides_nothing():
    engine = Engine(hangs=True)

    async def fail(request_id):
        raise ZeroDivisionError

    engine.abort = fail

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(canary(engine)[0].send(), 0.05)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine([{"token_ids": [1]}]), "ended without a finish_reason"),
        (Engine([{"token_ids": [100], "finish_reason": "stop"}]), "has the token 100"),
        (Engine(hangs=True), r"did not answer its first request within 0\.05 s"),
    ],
)
def test_a_warm_up_is_checked(engine, message):
    with pytest.raises(StartError, match=message):
        asyncio.run(canary(engine)[0].warm_up(EngineChecks("engine 'toy'"), TokenRequests(100), 0.05))


def test_a_warm_up_passes_a_good_answer():
    engine = Engine()
    asyncio.run(canary(engine)[0].warm_up(EngineChecks("engine 'toy'"), TokenRequests(100), 5))
    assert len(engine.asked) == 1
