"""SGLang's own `Engine` in a loop, with nothing around it: what a worker could reach. Prints one JSON object."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_PROMPT = list(range(10, 37))


async def measure(engine: Any, streams: int, requests: int, tokens: int) -> float:
    """Return tokens per second over so many requests, of which so many run at once.

    As in the load on the workers all prompts are the same, so that the prefix cache has the same work.
    """
    waiting = requests
    parameters = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    received = 0

    async def client() -> None:
        nonlocal received, waiting
        while waiting:
            waiting -= 1
            async for output in await engine.async_generate(input_ids=_PROMPT, sampling_params=parameters, stream=True):
                received += len(output["output_ids"])

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(streams)))
    return received / (time.monotonic() - began)


def main() -> None:
    """Start the engine, warm it up, and measure in rounds."""
    import sglang
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("streams", "requests", "tokens", "rounds"):
        parser.add_argument(f"--bench-{name}", type=int, required=True)
    ServerArgs.add_cli_args(parser)
    arguments = parser.parse_args()
    arguments.incremental_streaming_output = True
    engine = sglang.Engine(server_args=ServerArgs.from_cli_args(arguments))
    streams, tokens = arguments.bench_streams, arguments.bench_tokens

    async def rounds() -> list[float]:
        await measure(engine, streams, streams, tokens)
        return [await measure(engine, streams, arguments.bench_requests, tokens) for _ in range(arguments.bench_rounds)]

    print(json.dumps({"tokens_per_second": engine.loop.run_until_complete(rounds())}), flush=True)
    # At the end of the path, because beside `common` there is a `sglang.py`.
    sys.path.append(str(Path(__file__).parents[1]))
    from common.processes import descendants
    from common.workbench import remove, shared_memory_of

    left = shared_memory_of([os.getpid(), *descendants(os.getpid())])
    engine.shutdown()
    remove(left)


if __name__ == "__main__":
    main()
