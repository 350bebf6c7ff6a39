"""A client of a worker's endpoint, without a frontend: sends what it reads, and writes how that ended.

A process of its own, because the runtime's threads end with their process only. Both ways go marshalled objects, each
after its length (`pickle` does not nest as deep).
"""

from __future__ import annotations

import asyncio
import marshal
import os
import struct
import sys
from typing import Any

from dynamo.runtime import Context, DistributedRuntime

#: Seconds within which a request must end by itself, and chunks after which it is cancelled.
LIMIT, MOST_CHUNKS = 20.0, 40


def write(stream: Any, value: object) -> None:
    """Write one object to a binary stream."""
    data = marshal.dumps(value)
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def read(stream: Any) -> Any:
    """Read one object from a binary stream."""
    (length,) = struct.unpack("<I", stream.read(4))
    return marshal.loads(stream.read(length))


async def ask(client: Any, request: object) -> tuple[str, object]:
    """Make one request; return how it ended, and its last chunk or error."""
    context = Context()
    last = None

    async def receive() -> tuple[str, object]:
        nonlocal last
        count = 0
        async for chunk in await client.round_robin(request, context=context):
            last = chunk.data()
            count += 1
            if count == MOST_CHUNKS:
                context.stop_generating()
        return "stopped" if count >= MOST_CHUNKS else "ended", last

    try:
        return await asyncio.wait_for(receive(), LIMIT)
    except asyncio.TimeoutError:
        return "hangs", last
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


async def main() -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    client = await runtime.endpoint("dynamo.backend.generate").client()
    await client.wait_for_instances()
    loop = asyncio.get_running_loop()
    while True:
        try:
            requests = await loop.run_in_executor(None, read, sys.stdin.buffer)
        except struct.error:
            os._exit(0)
        write(sys.stdout.buffer, await asyncio.gather(*(ask(client, request) for request in requests)))


if __name__ == "__main__":
    asyncio.run(main())
