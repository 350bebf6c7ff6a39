"""A small, complete engine with a process of its own, and one bug of choice (``dynamo_worker_buggy.BUG``).

Each step, which the process answers, gives every request its next token. The place of each bug is where an author
would make it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable
from multiprocessing import shared_memory
from pathlib import Path

import buggy_core
from dynamo_worker_buggy import BUG
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily

from dynamo_worker import (
    Chunk,
    Deadline,
    EngineContext,
    EngineDeadError,
    EngineInfo,
    InvalidRequestError,
    Request,
    RequestContext,
)
from dynamo_worker.engines.echo import MODEL_DIR
from dynamo_worker.kit import fields
from dynamo_worker.kit.chunks import top_logprob, usage
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
from dynamo_worker.kit.translation import RequestTable

VOCAB_SIZE = 259
CONTEXT_LENGTH = 4096
#: What outlives an engine by mistake.
LEAKED: list[object] = []


def _count(name: str, value: object) -> int:
    count = fields.integer(name, value)
    if count < 0:
        raise InvalidRequestError(f"{name}: expected 0 or more, got {count}")
    return count


_ONE_ANSWER = ("", fields.unsupported(1))
#: A distribution with one token: temperature and the like change nothing, so they are honoured by doing nothing.
TABLE = RequestTable.of_engine(
    sampling={
        "n": _ONE_ANSWER,
        "best_of": _ONE_ANSWER,
        "guided_decoding": ("", fields.unsupported()),
        "use_beam_search": ("", fields.unsupported(False)),
        **{name: ("", fields.unsupported(0)) for name in ("presence_penalty", "frequency_penalty", "length_penalty")},
        "repetition_penalty": ("", fields.unsupported(1)),
    },
    stop={"max_tokens": ("max_tokens", _count), "max_thinking_tokens": ("", fields.unsupported())},
    output={"prompt_logprobs": ("", fields.unsupported())},
)


def section(request: Request) -> dict[str, object]:
    return dict(fields.section(request, "sampling_options"))


class Stream:
    """One request in progress."""

    def __init__(self, request: Request) -> None:
        if BUG == "unknown-field-ignored":
            sampling = {name: value for name, value in section(request).items() if name in TABLE.sampling}
            request = {**request, "sampling_options": sampling}
        given = TABLE.read(request, {})
        self.prompt: list[int] = request["token_ids"]
        room = CONTEXT_LENGTH - len(self.prompt)
        self.count = min(given.get("max_tokens", room), room)
        self.least: int = given.get("min_tokens") or 0
        self.stops = set() if BUG == "stop-token-ignored" else set(given.get("stop_token_ids") or ())
        self.logprobs: int | None = given.get("logprobs")
        if BUG == "field-ignored":
            self.logprobs = None
        self.made = 0
        self.queue: asyncio.Queue[tuple[list[int], str | None]] = asyncio.Queue()

    def step(self) -> bool:
        """Make the next token, and return whether it was the last."""
        token = self.prompt[self.made % len(self.prompt)] if self.count else 0
        self.made += 1
        reason = None
        if token in self.stops and self.made >= self.least:
            reason = "stop"
        elif self.made >= self.count + (3 if BUG == "max-tokens-exceeded" else 0):
            reason = "length"
        if BUG == "never-finishes":
            reason = None
        self.queue.put_nowait(([token] if self.count else [], reason))
        return reason is not None


class BuggyEngine(EngineLifecycle):
    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self.args = args
        self.context = context
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None
        self.scheduler: asyncio.Task[None] | None = None
        self.streams: dict[str, Stream] = {}
        self.work = asyncio.Event()
        self.steps = self.requests = 0
        self.dead = ""
        self.closed = False
        self.registry = CollectorRegistry()
        if BUG == "invalid-metrics":
            self.registry.register(Collector())
        else:
            self.tokens = Counter(
                "dynamo_worker_tokens" if BUG == "metrics-take-the-workers-names" else "buggy_tokens",
                "Tokens of all answers.",
                registry=self.registry,
            )
        if BUG == "create-starts-a-process":
            self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        if BUG == "create-starts-a-thread":
            threading.Thread(target=time.sleep, args=(3,), daemon=True).start()

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:
        if BUG == "start-twice-is-broken":
            if LEAKED:
                raise RuntimeError("the engine is initialized already")
            LEAKED.append(self)
        if BUG == "signal-handlers":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, buggy_core.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        if BUG == "stop-in-mid-start-leaves-a-process":
            LEAKED.append(ours)  # the process ends with its connection
            await self.ping(ours)
            await asyncio.sleep(0.5)
        self.process, self.connection = process, ours
        await self.ping(ours)
        self.scheduler = asyncio.ensure_future(self.run())
        self.leak()
        return EngineInfo(
            model_name=self.args.served_model_name,
            model_path=str(MODEL_DIR),
            context_length=-1 if BUG == "wrong-engine-info" else CONTEXT_LENGTH,
            vocab_size=None if BUG in ("no-vocabulary", "wrong-token-kills") else VOCAB_SIZE,
        )

    def leak(self) -> None:
        """Start what nobody ends."""
        if BUG == "leaks-a-child":
            LEAKED.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        elif BUG == "leaks-a-thread":
            threading.Thread(target=time.sleep, args=(30,), daemon=True, name="poller").start()
        elif BUG == "leaks-a-segment":
            LEAKED.append(shared_memory.SharedMemory(create=True, size=4096))
        elif BUG == "leaks-a-file":
            LEAKED.append(Path(tempfile.mkstemp(prefix="buggy-", dir="/tmp")[1]))
        elif BUG == "leaks-a-socket":
            LEAKED.append(socket.socketpair())
        elif BUG == "leaks-a-descriptor":
            LEAKED.append(os.open("/dev/null", os.O_RDONLY))
        elif BUG == "leaks-a-task":
            LEAKED.append(asyncio.ensure_future(asyncio.sleep(60)))
        elif BUG == "changes-directory":
            os.chdir("/")

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        self.requests += 1
        if BUG == "second-request-fails" and self.requests == 2:
            raise KeyError("state of the first request")
        if BUG == "blocks-the-loop" and len(request["token_ids"]) > 1:
            time.sleep(3)
        if BUG == "wrong-token-kills" and max(request["token_ids"]) >= VOCAB_SIZE:
            self.die("index out of range: the engine has aborted")
        if self.dead:
            raise EngineDeadError(self.dead)
        if BUG == "bad-value-is-a-crash":
            float(section(request).get("temperature") or 0)
        stream = Stream(request)
        if BUG == "mixes-streams":
            for other in self.streams.values():
                other.prompt = stream.prompt
        self.streams[context.id()] = stream
        self.work.set()
        finished = False
        try:
            while not finished:
                tokens, reason = await stream.queue.get()
                if self.dead and BUG != "swallows-its-death":
                    raise EngineDeadError(self.dead)
                finished = reason is not None
                for chunk in self.chunks(stream, tokens, reason):
                    yield chunk
        except asyncio.CancelledError:
            if BUG != "cancellation-is-ignored":
                raise
            await asyncio.sleep(5)
        finally:
            if BUG != "ignores-abort":
                self.streams.pop(context.id(), None)

    def chunks(self, stream: Stream, tokens: list[int], reason: str | None) -> Iterable[Chunk]:
        """Return the chunks of one step of a request."""
        chunk: Chunk = {"token_ids": tokens, "index": 0}
        if BUG == "ids-beyond-the-vocabulary":
            chunk["token_ids"] = [token + VOCAB_SIZE for token in tokens]
        elif BUG == "tokens-are-no-integers":
            chunk["token_ids"] = [float(token) for token in tokens]
        elif BUG == "chunks-repeat-old-tokens":
            chunk["token_ids"] = [stream.prompt[at % len(stream.prompt)] for at in range(stream.made)]
        elif BUG == "unknown-chunk-field":
            chunk["finish_reson"] = reason
        elif BUG == "chunk-is-reused":
            chunk = self.__dict__.setdefault("chunk", {"index": 0})
            chunk["token_ids"] = tokens
        if stream.logprobs is not None and tokens:
            chunk["log_probs"] = [0.0] * (2 if BUG == "log-probabilities-of-wrong-shape" else 1)
            chunk["top_logprobs"] = [[top_logprob(token, 0.0, 1, None)] for token in tokens]
            if BUG == "log-probabilities-are-positive":
                chunk["log_probs"] = [0.5]
        elif BUG == "log-probabilities-unasked" and tokens:
            chunk["log_probs"] = [0.0]
        if reason is not None:
            made = len(tokens) and stream.made
            chunk["completion_usage"] = usage(len(stream.prompt), made, None)
            if BUG == "usage-is-wrong":
                chunk["completion_usage"] = usage(len(stream.prompt), made - 1, None)
            if BUG != "no-finish-reason":
                chunk["finish_reason"] = "done" if BUG == "unknown-finish-reason" else reason
        yield chunk
        if reason is not None and BUG == "two-finish-reasons":
            yield {"token_ids": [], "index": 0, "finish_reason": reason}
        if reason is not None and BUG == "chunk-after-the-finish":
            yield {"token_ids": [], "index": 0}

    if BUG != "no-abort":

        async def abort(self, request_id: str) -> None:
            if BUG == "abort-of-an-unknown-id-fails":
                del self.streams[request_id]
            elif BUG == "abort-ends-all":
                for stream in self.streams.values():
                    stream.count = stream.made + 1
            elif BUG == "abort-hangs":
                await asyncio.sleep(60)
            elif BUG != "ignores-abort":
                self.streams.pop(request_id, None)

    def processes(self) -> Iterable[int]:
        if BUG == "hides-its-process":
            return ()
        return () if self.process is None else (self.process.pid,)

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> Request:
        if BUG == "canary-is-shared":
            return self.__dict__.setdefault("canary", {"token_ids": [3], "stop_conditions": {"max_tokens": 1}})
        return {"token_ids": [3], "stop_conditions": {"max_tokens": 20 if BUG == "canary-is-long" else 1}}

    def progress(self) -> int:
        if BUG == "progress-while-stuck":
            return time.monotonic_ns()
        return self.steps if BUG != "progress-goes-back" else 1_000_000 - self.steps

    def metrics_registry(self) -> CollectorRegistry:
        return self.registry

    # --- The lifecycle hooks

    async def check_health(self) -> None:
        if BUG == "health-check-lies":
            return
        if BUG == "health-check-blocks":
            time.sleep(0.3)
        if BUG == "health-check-hangs":
            await asyncio.sleep(60)
        if self.dead:
            raise EngineDeadError(self.dead)

    async def drain(self, deadline: Deadline) -> None:
        if BUG == "drain-ends-the-engine":
            await self.shutdown(deadline)
        if BUG == "drain-hangs":
            await asyncio.sleep(60)

    async def shutdown(self, deadline: Deadline) -> None:
        if BUG == "cleanup-hangs":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        if BUG == "cleanup-blocks":
            time.sleep(5)
        if BUG == "cleanup-needs-a-start" and self.connection is None:
            raise AttributeError("'NoneType' object has no attribute 'close'")
        if BUG == "cleanup-is-not-idempotent" and self.closed:
            raise RuntimeError("the engine is closed already")
        self.closed = True
        if self.scheduler is not None:
            self.scheduler.cancel()
        if self.connection is not None and BUG != "cleanup-leaves-the-process":
            self.connection.close()
        process, self.process = self.process, None
        if process is None or BUG == "cleanup-leaves-the-process":
            LEAKED.append((process, self.connection))
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()

    # --- The steps

    async def ping(self, connection: socket.socket) -> bool:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(connection, b"s")
            return bool(await loop.sock_recv(connection, 1))
        except OSError:
            return False

    def die(self, reason: str) -> None:
        self.dead = reason
        for stream in self.streams.values():
            stream.queue.put_nowait(([], "stop" if BUG == "swallows-its-death" else "error"))

    async def run(self) -> None:
        """Step as long as there are requests."""
        assert self.connection is not None
        loop = asyncio.get_running_loop()
        while True:
            if self.streams:
                waiting = asyncio.ensure_future(self.ping(self.connection))
                alive = await waiting
            else:
                self.work.clear()
                woken = asyncio.ensure_future(self.work.wait())
                ended = asyncio.ensure_future(loop.sock_recv(self.connection, 1))
                try:
                    await asyncio.wait({woken, ended}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    woken.cancel()
                    ended.cancel()
                if not ended.done() or ended.cancelled():
                    continue
                alive = False
            if not alive:
                self.die("the engine's process is gone")
                return
            self.steps += 1
            for name, stream in list(self.streams.items()):
                if stream.step():
                    self.streams.pop(name, None)
                    if hasattr(self, "tokens"):
                        self.tokens.inc(stream.made)
            await asyncio.sleep(self.args.step_seconds)


class Collector:
    """Describes a metric that no Prometheus accepts."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily("buggy_tokens", "Tokens of all answers.", labels=["model"])
        family.add_metric(["a"], float("nan"))
        family.add_metric(["a"], 1.0)
        yield family
