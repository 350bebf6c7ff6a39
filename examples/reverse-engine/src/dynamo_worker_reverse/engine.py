"""The adapter: the engine protocol of dynamo-worker on one side, the engine's own process on the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError
from dynamo_worker.kit import fields
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error
from dynamo_worker.kit.python_command import python_command
from dynamo_worker.kit.translation import RequestTable

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker import Chunk, Deadline, EngineContext, Request, RequestContext

#: What frontends need: ``config.json`` and a tokenizer.
MODEL_DIR = Path(__file__).parent / "model"
CONTEXT_LENGTH = 131_072
#: The chat template puts this token between prompt and answer. After a migration it is followed by the tokens that
#: another worker has sent: the request continues from there.
ANSWER_TOKEN = 0
#: The number of token ids: the worker refuses prompts with others.
VOCAB_SIZE = 259
#: What becomes of each field of a request. One that the engine lacks is refused by name, never silently ignored; one
#: that only says how to sample changes nothing, as every next token is certain.
_TABLE = RequestTable.of_engine(
    sampling={
        "n": ("", fields.unsupported(1)),
        "guided_decoding": ("", fields.unsupported({})),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), ("", fields.unsupported(0))),
        "repetition_penalty": ("", fields.unsupported(1)),
    },
    stop={
        **dict.fromkeys(("stop_token_ids", "stop_token_ids_visible"), ("", fields.unsupported([]))),
        **dict.fromkeys(("min_tokens", "max_thinking_tokens"), ("", fields.unsupported(0))),
    },
    output=dict.fromkeys(("logprobs", "prompt_logprobs"), ("", fields.unsupported())),
)


@dataclass(frozen=True)
class ReverseRequest:
    """A request in the engine's own terms.

    :param tokens: the prompt.
    :param start: index of the first token of the answer to send.
    :param count: number of tokens; None for the rest of the answer.
    """

    tokens: list[int]
    start: int
    count: int | None

    @classmethod
    def parse(cls, request: Request) -> ReverseRequest:
        """Read a request of the Dynamo frontend.

        :raises InvalidRequestError: it asks for something that this engine cannot do.
        """
        parameters = _TABLE.read(request, {})
        tokens: list[int] = request["token_ids"]
        if len(tokens) >= CONTEXT_LENGTH:
            raise InvalidRequestError(f"the prompt has {len(tokens)} tokens; the context length is {CONTEXT_LENGTH}")
        prompt, start = tokens, 0
        if ANSWER_TOKEN in tokens:
            split = len(tokens) - 1 - tokens[::-1].index(ANSWER_TOKEN)
            prompt, start = tokens[:split], len(tokens) - split - 1
        if not any(token > 2 for token in prompt):
            raise InvalidRequestError("there is nothing to reverse: the prompt is empty")
        room = CONTEXT_LENGTH - len(tokens)
        count = min(max(0, parameters.get("max_tokens", room)), room)
        if not parameters.get("ignore_eos"):
            left = max(0, len(prompt) - start)
            return cls(prompt, start, count if count < left else None)
        return cls(prompt, start, count)


class ReverseEngine(EngineLifecycle):
    """One core process, and the requests that wait for it."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._args = args
        self._context = context
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._streams: dict[str, asyncio.Queue[tuple[int | None, bool]]] = {}
        self._answers: dict[str, list[asyncio.Future[None]]] = {"pong": [], "flushed": []}
        self._steps = 0
        self._dead: str | None = None

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the core and wait until it answers."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *python_command("dynamo_worker_reverse.core"),
                    str(theirs.fileno()),
                    str(self._args.tokens_per_second),
                    str(self._args.usage_file or ""),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=self._context.private_dir,
                start_new_session=True,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
        if not await reader.readline():
            code = self._process.wait(timeout=5)
            raise start_error("the reverse engine", f"its core exited with code {code}")
        self._reading = asyncio.ensure_future(self._read(reader))
        return EngineInfo(
            model_name=self._args.served_model_name,
            model_path=str(MODEL_DIR),
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
        )

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Yield the prompt backwards, one token a chunk."""
        wanted = ReverseRequest.parse(request)
        queue: asyncio.Queue[tuple[int | None, bool]] = asyncio.Queue()
        name = context.id()
        self._streams[name] = queue
        try:
            self._send({"op": "add", "id": name, **vars(wanted)})
            while True:
                token, done = await queue.get()
                if self._dead is not None:
                    raise EngineDeadError(self._dead)
                chunk: Chunk = {"token_ids": [] if token is None else [token], "index": 0}
                if done:
                    chunk["finish_reason"] = "stop" if wanted.count is None else "length"
                yield chunk
                if done:
                    return
        finally:
            self._streams.pop(name, None)

    async def abort(self, request_id: str) -> None:
        """Tell the core to forget a request."""
        if self._dead is None and self._writer is not None:
            self._send({"op": "abort", "id": request_id})

    def processes(self) -> Iterable[int]:
        """Return the core's pid."""
        return () if self._process is None else (self._process.pid,)

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> Request:
        """Return a request for one token: for the warm-up, and to find out whether a silent engine is alive."""
        return {"token_ids": [36, ANSWER_TOKEN], "stop_conditions": {"max_tokens": 1}}

    def progress(self) -> int:
        """Return the number of steps the core has reported."""
        return self._steps

    # --- The lifecycle hooks

    async def check_health(self) -> None:
        """Return when the core has answered a ping; without an answer the hook times out.

        :raises EngineDeadError: the connection has ended.
        """
        await self._ask("ping", "pong")

    async def drain(self, deadline: Deadline) -> None:  # noqa: ARG002 - the hook is cancelled at the deadline
        """Have the core write its usage records, which no request in flight shows."""
        await self._ask("flush", "flushed")

    async def shutdown(self, deadline: Deadline) -> None:
        """Ask the core to end, kill it shortly before the deadline, and wait for it."""
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        process, self._process = self._process, None
        if process is None:
            return
        soft = deadline.reserve(0.2)
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process does not handle the SIGTERM
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        while process.poll() is None:
            if soft.passed:
                process.kill()
                break
            await asyncio.sleep(0.005)
        process.wait()

    # --- The connection to the core

    async def _ask(self, question: str, answer: str) -> None:
        self._send({"op": question})
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers[answer].append(future)
        await future

    def _send(self, message: dict[str, Any]) -> None:
        if self._dead is not None or self._writer is None:
            raise EngineDeadError(self._dead or "the reverse engine is not started")
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._handle(json.loads(line))
        self._dead = "the reverse engine's core has closed its connection"
        for queue in self._streams.values():
            queue.put_nowait((None, True))
        for waiting in self._answers.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(EngineDeadError(self._dead))
            waiting.clear()

    def _handle(self, message: dict[str, Any]) -> None:
        if message["op"] != "step":
            waiting = self._answers[message["op"]]
            future = waiting.pop(0)
            if not future.done():
                future.set_result(None)
            return
        self._steps += 1
        tokens, done = message["tokens"], set(message["done"])
        for name in {*tokens, *done}:
            queue = self._streams.get(name)
            if queue is not None:
                queue.put_nowait((tokens.get(name), name in done))
