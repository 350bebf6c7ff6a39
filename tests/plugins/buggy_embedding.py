"""The buggy engine as one that makes embeddings, with a bug of such engines (``dynamo_worker_buggy.BUG``)."""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

from buggy_engine import BuggyEngine
from dynamo_worker_buggy import BUG

from dynamo_worker import EngineContext, RequestContext
from dynamo_worker.engines.echo_embedding import EchoEmbeddingEngine


class BuggyEmbeddingEngine(EchoEmbeddingEngine):
    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(BuggyEngine(args, context), args.served_model_name, takes_text=False)
        self.turn = asyncio.Lock()

    async def generate(self, request: Any, context: RequestContext) -> AsyncIterator[Any]:
        if BUG == "embedding-sorts-by-length":
            request = {**request, "inputs": sorted(request["inputs"], key=len)}
        elif BUG == "embedding-ignores-dimensions":
            request = {name: value for name, value in request.items() if name != "dimensions"}
        elif BUG == "embedding-sees-lengths-only":
            request = {**request, "inputs": [[3] * len(one) for one in request["inputs"]]}
        if BUG == "embedding-has-one-turn":
            async with self.turn:
                answer = await self.answer(request, context)
        elif BUG == "embedding-goes-on-for-nobody":
            working = asyncio.ensure_future(self.answer(request, context))
            while not working.done():
                try:
                    await asyncio.shield(working)
                except asyncio.CancelledError:
                    continue  # the batch is on the device: it is finished
            answer = await working
        else:
            answer = await self.answer(request, context)
        vectors = answer["embeddings"]
        if BUG == "embedding-loses-the-last":
            del vectors[-1:]
        elif BUG == "embedding-is-not-finite":
            vectors[0][0] = math.nan
        elif BUG == "embedding-is-too-long":
            vectors[0].append(0.0)
        elif BUG == "embedding-is-never-counted":
            answer["prompt_tokens"] = 0
        yield answer
        if BUG == "embedding-comes-twice":
            yield answer

    async def answer(self, request: Any, context: RequestContext) -> Any:
        async for answer in super().generate(request, context):
            found = answer
        return found
