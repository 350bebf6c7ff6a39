"""Clients that ask for embeddings, one request after the other on connections that stay open."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass, field

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class EmbeddingLoad:
    """What the clients did.

    :ivar embeddings: vectors that arrived.
    :ivar seconds: from the first request to the last answer.
    :ivar latencies: of each request, in seconds.
    :ivar lost: requests without an answer of HTTP status 200.
    """

    embeddings: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    lost: int = 0


def run(
    port: int, model: str, *, clients: int, requests: int, inputs: int, tokens: int, text: bool, timeout: float
) -> EmbeddingLoad:
    """Send the requests, and return what came of them.

    :param clients: requests in flight at a time.
    :param requests: of all clients together.
    :param inputs: of each request.
    :param tokens: of each input, or words if it is text.
    :param timeout: bound of the whole load in seconds.
    """
    bodies = [_body(model, number, inputs, tokens, text=text) for number in range(min(requests, 64))]
    heads = [
        b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
        for body in bodies
    ]
    result = EmbeddingLoad()
    left = iter(range(requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        for number in left:
            began = time.perf_counter()
            writer.write(heads[number % len(heads)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
            result.latencies.append(time.perf_counter() - began)
            if b" 200 " in head[:16] and body.count(b'"index"') == inputs:
                result.embeddings += inputs
            else:
                result.lost += 1
        writer.close()

    async def all_clients() -> None:
        began = time.perf_counter()
        await asyncio.wait_for(asyncio.gather(*(client() for _ in range(clients))), timeout)
        result.seconds = time.perf_counter() - began

    asyncio.run(all_clients())
    return result


def _body(model: str, number: int, inputs: int, tokens: int, *, text: bool) -> bytes:
    chosen = random.Random(number)
    words = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog")
    batch: list[str | list[int]] = [
        " ".join(chosen.choice(words) for _ in range(tokens))
        if text
        else [chosen.randrange(3, 250) for _ in range(tokens)]
        for _ in range(inputs)
    ]
    return json.dumps({"model": model, "input": batch, "encoding_format": "base64"}).encode()
