"""An engine for tests that does, on demand, everything an engine must not do.

It is found like any installed plugin: this directory, with its dist-info, is put on PYTHONPATH. A request asks for a
fault with a word in its prompt; flags choose faults of the start and of the hooks.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import faulty_processes
from dynamo.llm import KvEventPublisher, WorkerMetricsPublisher
from dynamo.runtime import Endpoint

from dynamo_worker import Chunk, Deadline, EngineContext, EngineDeadError, EngineInfo, Request, RequestContext, hookimpl
from dynamo_worker.engine import EndpointSpec, Send
from dynamo_worker.engines.echo import EchoEngine
from dynamo_worker.errors import InvalidRequestError, StartError
from dynamo_worker.logs import get_logger

log = get_logger(__name__)

#: Long enough for every test, short enough to end by itself.
FOREVER = 100.0
#: Longer than a health check should take, shorter than it may.
SLOW = 6.0
#: Longer than the operator's liveness probe waits, shorter than the heartbeat timeout.
NAP = 9.0


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


#: What no ``except Exception`` catches, by the word that asks for it.
NO_EXCEPTIONS = {
    "panic": lambda: PanicException("called `Option::unwrap()` on a `None` value"),
    "exit": lambda: SystemExit(0),
    "interrupt": KeyboardInterrupt,
    "cancel": asyncio.CancelledError,
}


def hold_gil(seconds: float) -> None:
    """Sleep in native code without releasing the GIL, as a driver call that hangs does."""
    library = ctypes.PyDLL(None)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:  # a signal interrupts it, such as the one that asks for the stack
        library.usleep(ctypes.c_uint(int(left * 1e6)))


def search() -> None:
    """Search for ``NAP`` seconds without releasing the GIL: each letter doubles what the pattern tries."""
    until, letters = time.monotonic() + NAP, 18
    while time.monotonic() < until:
        began = time.monotonic()
        re.match(r"(a+)+$", "a" * letters + "b")
        # The last searches take most of the time, the longest of them more than half.
        letters += time.monotonic() - began < NAP / 4


def raise_for(place: str, faults: Sequence[str]) -> None:
    """Raise what one of the faults, ``PLACE=KIND``, asks for at this place."""
    for kind, error in NO_EXCEPTIONS.items():
        if f"{place}={kind}" in faults:
            raise error()


class FaultyEngine(EchoEngine):
    """The echo engine, and what is wrong with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args
        self._requests = 0
        self.task: asyncio.Task[None] | None = None
        self._publishers: list[object] = []

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        if self.args.announce:
            load = WorkerMetricsPublisher()
            await load.create_endpoint(endpoint)
            self._publishers = [load, KvEventPublisher(endpoint=endpoint, kv_block_size=16)]

    async def start(self, worker_id: int) -> EngineInfo:
        fault = self.args.start_fault
        if fault in ("block", "gil", "hang"):
            log.info("Waiting in the start")
        if fault == "block":
            time.sleep(FOREVER)
        elif fault == "gil":
            hold_gil(FOREVER)
        elif fault == "hang":
            await asyncio.sleep(FOREVER)
        elif fault == "error":
            raise StartError("no CUDA-capable device is detected", hint="run it on a machine with a GPU")
        elif fault == "bug":
            raise KeyError("a bug in the engine")
        raise_for("start", self.args.hook_fault)
        info = await super().start(worker_id)
        second = EndpointSpec("side", generate=super().generate, graceful_shutdown=False)
        return replace(info, model_path=self.args.model_directory or info.model_path, endpoints=[second])

    async def work(self) -> None:
        """Do what engines do in tasks of their own, for which nobody waits."""
        raise_for("task", self.args.hook_fault)

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        self._requests += 1
        raise_for("generate", self.args.hook_fault)
        text = "".join(chr(token - 3) for token in request["token_ids"] if token >= 3)
        if self._requests == 1:
            # The first request compiles.
            await asyncio.sleep(self.args.compile_seconds)
        if "poison" in text:
            raise RuntimeError("a request the engine cannot digest")
        if "bad" in text:
            raise InvalidRequestError("temperature must not be negative")
        if "bug" in text:
            raise ValueError("not enough values to unpack")
        if "print" in text:
            print("a line that waits in a buffer until the end")
        if "write" in text:  # as native code and child processes do
            os.write(1, b"\x1b[33mWARNING\x1b[0m 50 % of the memory is free\n")
            subprocess.run([sys.executable, "-c", "raise SystemError('in a child')"], check=False)
        if "dead" in text:
            raise EngineDeadError("CUDA error: an illegal memory access was encountered")
        if "unserializable" in text:
            yield {"token_ids": [object()]}
        if "nap" in text:
            time.sleep(NAP)
        if "search" in text:
            search()
        if "block" in text:
            time.sleep(FOREVER)
        if "gil" in text:
            hold_gil(FOREVER)
        if "silent" in text:
            # One long step that reports nothing, such as a kernel compiled late.
            await asyncio.sleep(self.args.silent_seconds)
        # The echo engine has no log probabilities; those of a flood are made up below.
        plain: Request = {**request, "output_options": {}} if "flood" in text else request
        async for chunk in super().generate(plain, context):
            if "flood" in text:
                entries = [{"rank": rank, "token_id": rank, "token": "t", "logprob": -1.5} for rank in range(20)]
                chunk = {**chunk, "log_probs": [-0.1], "top_logprobs": [entries]}
            yield chunk
            for kind, error in NO_EXCEPTIONS.items():
                if kind in text:
                    raise error()


class PushingFaultyEngine(FaultyEngine):
    """The same, which hands its chunks over itself."""

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        async for chunk in self.generate(request, context):
            send(chunk)


class FaultyProcessEngine(FaultyEngine):
    """The same, whose answers wait for a process tree that does what the prompt says (``faulty_processes.py``)."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self._pids: list[int] = []
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def start(self, worker_id: int) -> EngineInfo:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, faulty_processes.__file__, "core", str(theirs.fileno()), self.args.core_waits]
            self._core = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._pids = [self._core.pid, int(await reader.readline())]
        self._reader = asyncio.ensure_future(self._read(reader))
        return await super().start(worker_id)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while await reader.readline():
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)

    async def _ask(self, line: str) -> None:
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append(answered)
        self._writer.write(f"{line}\n".encode())
        await answered

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        text = "".join(chr(token - 3) for token in request["token_ids"] if token >= 3)
        asked = re.search(rf"({'|'.join(faulty_processes.FAULTS)}) [\d.]+", text)
        await self._ask(asked[0] if asked else "nothing")
        async for chunk in super().generate(request, context):
            yield chunk

    async def check_health(self) -> None:
        if self.args.health_asks_rank:
            await self._ask("nothing")

    def processes(self) -> Sequence[int]:
        return self._pids


class FaultyPlugin:
    @hookimpl
    def prepare(self, arguments: Sequence[str]) -> None:
        raise_for("prepare", arguments)

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        raise_for("add_arguments", sys.argv)
        group = parser.add_argument_group("faulty engine")
        group.add_argument("--model-name", default="echo")
        group.add_argument("--model-directory")
        group.add_argument("--tokens-per-second", type=float, default=0.0)
        group.add_argument("--start-seconds", type=float, default=0.0)
        group.add_argument("--prefill-seconds", type=float, default=0.0)
        group.add_argument("--compile-seconds", type=float, default=0.0)
        group.add_argument("--silent-seconds", type=float, default=0.0)
        group.add_argument("--push", action="store_true")
        group.add_argument("--announce", action="store_true", help="publish KV events and load")
        group.add_argument("--core-waits", choices=["sleep", "spin"], help="answer from processes")
        group.add_argument("--health-asks-rank", action="store_true")
        group.add_argument("--start-fault", choices=["block", "gil", "hang", "error", "bug"])
        group.add_argument("--hook-fault", action="append", default=[], metavar="PLACE=KIND")

    @hookimpl
    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> FaultyEngine:
        raise_for("create_engine", args.hook_fault)
        if args.core_waits:
            return FaultyProcessEngine(args)
        return (PushingFaultyEngine if args.push else FaultyEngine)(args)

    @hookimpl
    async def on_ready(self, engine: FaultyEngine, info: EngineInfo) -> None:
        await self._misbehave(engine, "on_ready")

    @hookimpl
    async def check_health(self, engine: FaultyEngine) -> None:
        await self._misbehave(engine, "check_health")
        await engine.check_health()
        engine.task = asyncio.ensure_future(engine.work())

    @hookimpl
    async def drain(self, engine: FaultyEngine, deadline: Deadline) -> None:
        await self._misbehave(engine, "drain")

    @hookimpl
    async def on_fatal_error(self, engine: FaultyEngine | None, error: BaseException, deadline: Deadline) -> None:
        if engine is not None:
            await self._misbehave(engine, "on_fatal_error")

    @hookimpl
    async def cleanup(self, engine: FaultyEngine, deadline: Deadline) -> None:
        await self._misbehave(engine, "cleanup")

    async def _misbehave(self, engine: FaultyEngine, hook: str) -> None:
        for fault in engine.args.hook_fault:
            name, _, kind = fault.partition("=")
            if name != hook:
                continue
            raise_for(hook, [fault])
            if kind == "raise":
                raise RuntimeError(f"{hook} is broken")
            if kind == "block":
                time.sleep(FOREVER)
            if kind == "slow":
                await asyncio.sleep(SLOW)
                continue
            while True:
                try:
                    await asyncio.sleep(FOREVER)
                except asyncio.CancelledError:
                    if kind != "stubborn":
                        raise


plugin = FaultyPlugin()
