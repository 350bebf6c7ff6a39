"""The floor: a push handler straight on `ai-dynamo-runtime`, with no bookkeeping at all."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import uvloop
from arguments import parse, visible
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def _main() -> None:
    arguments = parse("A push handler straight on ai-dynamo-runtime.")
    interval = 1.0 / arguments.tokens_per_second if arguments.tokens_per_second else 0.0

    async def handler(request: dict[str, Any], context: Any, response_sender: Any) -> AsyncIterator[Any]:  # noqa: ARG001
        text = visible(request["token_ids"])
        length = len(text)
        last = (request["stop_conditions"].get("max_tokens") or 16) - 1
        send = response_sender.send
        for index in range(last):
            send({"token_ids": [text[index % length]], "index": 0})
            await asyncio.sleep(interval)
        send({"token_ids": [text[last % length]], "index": 0, "finish_reason": "length"})
        return
        yield  # type: ignore[unreachable]

    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "file", "tcp")
    endpoint = runtime.endpoint(f"{arguments.namespace}.{arguments.component}.generate")
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        arguments.model_path,
        arguments.model_name,
        worker_type=WorkerType.Aggregated,
    )
    loop.add_signal_handler(signal.SIGTERM, runtime.shutdown)
    await endpoint.serve_endpoint(handler, graceful_shutdown=True)


if __name__ == "__main__":
    uvloop.run(_main())
