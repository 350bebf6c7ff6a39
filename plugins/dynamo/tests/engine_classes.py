"""Engine classes of Dynamo's protocol for the tests: one that computes in a process, and others that go wrong.

Run as a program, this file is the process of :class:`CountingEngine`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time

if __name__ == "__main__":
    # Every 10 ms, one step for all requests at once: the ids whose turn it is go out in one line.
    os.set_blocking(0, False)
    running: set[str] = set()
    pending = b""
    while True:
        time.sleep(0.01)
        try:
            got = os.read(0, 1 << 20)
        except BlockingIOError:
            got = None
        if got == b"":
            sys.exit()
        *lines, pending = (pending + (got or b"")).split(b"\n")
        for line in lines:
            message = json.loads(line)
            (running.add if message["run"] else running.discard)(message["id"])
        if running:
            os.write(1, json.dumps(sorted(running)).encode() + b"\n")

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.publisher import ComponentSnapshot
from dynamo.llm.exceptions import InvalidArgument
from prometheus_client import CollectorRegistry, Counter

WORDS = 3000


class EngineDeadError(Exception):
    """As vLLM calls its own."""


class CountingEngine(LLMEngine):
    """Counts on from the last token of the prompt, so that an answer goes on after a migration as it began."""

    def __init__(self, args):
        self.args = args
        self.process = None
        self.steps = {}
        self.aborted = []
        self.controls = []
        self.snapshots = None
        self.tokens = CollectorRegistry()
        self.counter = Counter("counting:tokens", "Tokens", registry=self.tokens)

    @classmethod
    async def from_args(cls, argv=None):
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", required=True)
        parser.add_argument("--loud", action="store_true")
        parser.add_argument("--hang", action="store_true")
        args = parser.parse_args(argv)
        if args.loud:
            take_over()
        return cls(args), WorkerConfig("theirs", model_name=args.model, endpoint_types="completions,chat")

    async def start(self, worker_id):
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self.reading = asyncio.ensure_future(self.read())
        if self.args.loud:
            take_over()
        llm = LlmRegistration(context_length=2048, kv_cache_block_size=16, total_kv_blocks=100)
        return EngineConfig(self.args.model, "counting", {"made": "here"}, llm, ["numbers"])

    async def read(self):
        while line := await self.process.stdout.readline():
            for name in json.loads(line):
                if name in self.steps:
                    self.steps[name].put_nowait(True)
            if self.snapshots is not None:
                count = len(self.steps)
                self.snapshots.publish(0, ComponentSnapshot(count, 100, count / 100, 0, 0.25))
        for queue in self.steps.values():
            queue.put_nowait(False)

    def tell(self, name, run):
        self.process.stdin.write(json.dumps({"id": name, "run": run}).encode() + b"\n")

    async def generate(self, request, context):
        if request["token_ids"][0] == 13:
            raise InvalidArgument("thirteen is not a number to begin with")
        name = context.id()
        queue = self.steps[name] = asyncio.Queue()
        last = request["token_ids"][-1]
        count = request["stop_conditions"].get("max_tokens") or 16
        self.tell(name, True)
        try:
            for index in range(count):
                if not await queue.get():
                    raise EngineDeadError("the core process has ended")
                if context.is_stopped():
                    yield {"token_ids": [], "index": 0, "finish_reason": "abort: as asked"}
                    return
                last = (last + 1) % WORDS if last < WORDS else 1
                self.counter.inc()
                chunk = {"token_ids": [last], "index": 0}
                if index == count - 1:
                    chunk["finish_reason"] = "length"
                yield chunk
        finally:
            del self.steps[name]
            self.tell(name, False)

    async def abort(self, context):
        self.aborted.append(context.id())

    def component_metrics_dp_ranks(self):
        return [0]

    def attach_snapshot_publisher(self, publisher):
        self.snapshots = publisher

    async def register_prometheus(self, metrics):
        from dynamo.common.backend.metrics import register_engine_registry

        register_engine_registry(metrics, self.tokens)

    def supported_controls(self):
        return {"note"}

    async def engine_control(self, control, body):
        self.controls.append((control, body))
        return {"status": "ok", "noted": body}

    def supported_updates(self):
        return {"taint"}

    async def engine_update(self, update, body):
        raise ValueError("nothing to taint")

    async def cleanup(self):
        if self.args.hang:
            await asyncio.Event().wait()
        if self.process is not None:
            self.process.stdin.close()
            await self.process.wait()


def take_over():
    """Do to the process what classes do that think it is theirs."""
    from dynamo.runtime.logging import configure_dynamo_logging

    configure_dynamo_logging()
    logging.basicConfig(level=logging.CRITICAL, force=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(66))
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, sys.exit, 66)
    sys.excepthook = print


class Failing(CountingEngine):
    """Its ``from_args`` does what the first flag says."""

    @classmethod
    async def from_args(cls, argv=None):
        kind = (argv or ["raise"])[0]
        if kind == "exit":
            sys.exit(4)
        if kind == "help":
            sys.exit(0)
        if kind == "package":
            import a_package_that_nobody_has  # noqa: F401
        if kind == "nothing":
            return "nothing"
        raise LookupError("no such model in the catalogue")


class FailingStart(CountingEngine):
    async def start(self, worker_id):
        await super().start(worker_id)
        raise MemoryError("no room for the weights")


class Lacking(LLMEngine):
    """Implements nothing."""


NUMBER = 7
