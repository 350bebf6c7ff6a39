#!/usr/bin/env python3
"""The server engine: what it adds to the time to the first token of a server, and its CPU time per token.

A server in a process of its own sends tokens at a fixed rate, each in a chunk of its own. This process asks it in
rounds, in another order each round:

- *bare*: the same bytes, received by an event loop and dropped: what no proxy can do without;
- *engine*: through `push` of the server engine, as the worker calls it, up to the chunks it sends.

What a worker does with a chunk after that is the same for every engine: `request_path.py` measures it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from common.report import add_output_arguments, bar, machine, median, number, progress, spread, table, write_json
from common.workbench import free_ports
from dynamo_worker import Deadline
from dynamo_worker.engine import LocalContext
from dynamo_worker_server import arguments
from dynamo_worker_server.engine import ServerEngine
from dynamo_worker_server.http_exchange import request_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Ask = Callable[[int, float], Awaitable[float]]

_SERVER = Path(__file__).parent / "workers" / "token_server.py"
#: Bars: milliseconds, and microseconds.
_FIRST_TOKEN_BAR, _CPU_BAR = 2.0, 15.0
#: Requests of one token that a round makes, one after the other.
_FIRST_TOKENS = 200


def _body(tokens: int, rate: float) -> dict[str, Any]:
    return {
        "model": "tokens",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": tokens,
        "temperature": rate,
        "stream": True,
    }


class _Bare(asyncio.Protocol):
    """Receives an answer and drops it."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.first = 0.0
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data:" in data:
            self.first = time.perf_counter()

    def connection_lost(self, _: Exception | None) -> None:
        self.end.set_result(None)


def _bare(port: int) -> Ask:
    async def ask(tokens: int, rate: float) -> float:
        started = time.perf_counter()
        body = json.dumps(_body(tokens, rate)).encode()
        request = request_bytes("POST", "/v1/chat/completions", {"Host": "127.0.0.1"}, body)
        _, protocol = await asyncio.get_running_loop().create_connection(lambda: _Bare(request), "127.0.0.1", port)
        await protocol.end
        return protocol.first - started

    return ask


def _engine(engine: ServerEngine) -> Ask:
    async def ask(tokens: int, rate: float) -> float:
        started, first, count = time.perf_counter(), 0.0, 0

        def send(_: object) -> None:
            nonlocal first, count
            first = first or time.perf_counter()
            count += 1

        await engine.push(_body(tokens, rate), LocalContext("benchmark"), send)
        if count != tokens + 1:
            sys.exit(f"expected {tokens + 1} chunks, got {count}")
        return first - started

    return ask


async def _round(ask: Ask, args: argparse.Namespace) -> tuple[float, float]:
    """Return the median time to the first token in milliseconds, and the CPU time per token in microseconds."""
    times = [await ask(1, 0.0) for _ in range(_FIRST_TOKENS)]
    before = time.process_time()
    await asyncio.gather(*(ask(args.tokens, args.rate) for _ in range(args.streams)))
    cpu = time.process_time() - before
    return 1e3 * (median(times) or 0.0), 1e6 * cpu / (args.streams * args.tokens)


async def _main(args: argparse.Namespace) -> int:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    (port,) = free_ports(1)
    command = [sys.executable, str(_SERVER), "--port", str(port)]
    engine = ServerEngine(parser.parse_args(["--server-port", str(port), "--", *command]), None)  # type: ignore[arg-type]
    results: dict[str, list[tuple[float, float]]] = {"bare": [], "engine": []}
    try:
        await engine.start(1)
        asks = {"bare": _bare(port), "engine": _engine(engine)}
        for number_of_round in range(args.rounds):
            names = list(results) if number_of_round % 2 else list(results)[::-1]
            for name in names:
                progress(f"round {number_of_round + 1} of {args.rounds}: {name}")
                results[name].append(await _round(asks[name], args))
    finally:
        await engine.shutdown(Deadline.after(10))
    added = [ours[0] - bare[0] for bare, ours in zip(results["bare"], results["engine"], strict=True)]
    rows = [
        [name, spread([one[0] for one in values], "ms"), spread([one[1] for one in values], "µs"), "", ""]
        for name, values in results.items()
    ]
    cpu = median(one[1] for one in results["engine"])
    rows[0][3:] = [spread(added, "ms"), bar(median(added), _FIRST_TOKEN_BAR)]
    rows[1][3:] = ["", bar(cpu, _CPU_BAR)]
    table(
        f"{args.streams} streams of {args.tokens} tokens at {args.rate:g} tokens/s, {args.rounds} rounds "
        f"(bars: {number(_FIRST_TOKEN_BAR, 'ms')} added, {number(_CPU_BAR, 'µs')})",
        ["", "first token", "CPU per token", "engine - bare", "bar"],
        rows,
    )
    progress(str(machine()))
    write_json(args.json, "server", {k: v for k, v in vars(args).items() if k != "json"}, results)
    return 0


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each stream (default: 50)")
    add_output_arguments(parser)
    return uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
