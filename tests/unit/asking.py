"""One request to an engine, through what the worker does for its kind: for tests of kinds."""

from __future__ import annotations

import asyncio

import pytest
from dynamo.runtime import Context

from dynamo_worker.engine import EndpointSpec
from dynamo_worker.host.requests.egress import Egress
from dynamo_worker.host.requests.serving import RequestHandler, RequestRegistry


class Engine:
    """Answers with these chunks; an exception among them is raised, an event waited for."""

    def __init__(self, *steps, push=False):
        self.steps, self.aborted, self.closed, self.begun = steps, [], 0, asyncio.Event()
        if push:
            self.push = self._push

    async def generate(self, request, context):
        self.begun.set()
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
                    await asyncio.sleep(0)
        finally:
            self.closed += 1

    async def _push(self, request, context, send):
        async for item in self.generate(request, context):
            send(item)

    async def abort(self, request_id):
        self.aborted.append(request_id)


class Sender:
    def __init__(self):
        self.sent = []

    def send(self, item, /):
        self.sent.append(item)


async def answer_of(engine, kind, request, during=None):
    """Return what one request brought: its chunks, the error or None, and its outcome.

    :param during: called with the registry once the engine has begun.
    """
    registry, egress, sender = RequestRegistry(), Egress(pytest.fail, slow_client_timeout=60.0), Sender()
    egress.start()
    handler = RequestHandler(engine, registry, egress, lambda error: None, kind)
    handler = handler.handler(EndpointSpec("g"))

    async def ask():
        async for _ in handler(dict(request), Context(id="r"), sender):
            pass

    task = asyncio.ensure_future(ask())
    try:
        if during is not None:
            await asyncio.wait_for(engine.begun.wait(), 10)
            await asyncio.sleep(0.01)
            during(registry)
        await asyncio.wait({task})
        await asyncio.sleep(0.01)
    finally:
        egress.stop()
    (outcome,) = [outcome for outcome, count in registry.outcomes.items() if count]
    return sender.sent, task.exception(), outcome
