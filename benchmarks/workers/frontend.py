"""An OpenAI HTTP frontend of `ai-dynamo-runtime` in a process of its own, migration on: `python frontend.py PORT`."""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop
from dynamo.llm import (  # type: ignore[attr-defined,unused-ignore]
    EngineType,
    EntrypointArgs,
    RouterConfig,
    RouterMode,
    make_engine,
    run_input,
)
from dynamo.runtime import DistributedRuntime


async def _main(port: int) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), os.environ.get("DYN_DISCOVERY_BACKEND", "file"), "tcp")
    arguments = EntrypointArgs(
        EngineType.Dynamic,
        http_host="127.0.0.1",
        http_port=port,
        router_config=RouterConfig(RouterMode.RoundRobin),
        migration_limit=3,
    )
    await run_input(runtime, "http", await make_engine(runtime, arguments))


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1])))
