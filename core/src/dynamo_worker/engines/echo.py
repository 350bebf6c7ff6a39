"""The echo engine: answers with the prompt's own tokens, over and over, at a chosen rate.

It needs no model and no GPU, but serves through the same entry point and hooks as every other engine. With
``--process-tree`` it generates in real processes, to reproduce any fault of an engine within seconds.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_worker import EngineInfo, hookimpl
from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.child_process import ChildProcess
from dynamo_worker.kit.engine_arguments import non_negative
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
from dynamo_worker.kit.engine_plugin import EnginePlugin
from dynamo_worker.kit.fields import integer, section, unsupported
from dynamo_worker.kit.translation import FRONTEND, OUTPUT, SAMPLING, STOP, RequestTable

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Chunk, EngineContext, Request, RequestContext
    from dynamo_worker.engines.echo_embedding import EchoEmbeddingEngine
    from dynamo_worker.engines.echo_text import EchoTextEngine

#: Configuration and tokenizer, with one token per byte and three special tokens.
MODEL_DIR = Path(__file__).parent / "echo_model"
#: Separates prompt and answer in the chat template. Tokens after it have already been sent: after a migration the new
#: worker continues in the middle of the text.
ANSWER_TOKEN = 0
EOS_TOKEN = 1
CONTEXT_LENGTH = 131_072
VOCAB_SIZE = 259
KV_BLOCK_SIZE = 16
#: Sampling options that the engine refuses rather than ignores.
_UNSUPPORTED = ("guided_decoding", "use_beam_search")
#: What the fields become: it samples nothing, so most options change nothing. It has no log probabilities, and stops
#: at no token.
_TABLE = RequestTable(
    sampling=dict.fromkeys((*SAMPLING, "guided_decoding"), FRONTEND),
    stop={
        **dict.fromkeys(STOP, FRONTEND),
        **dict.fromkeys(("stop_token_ids", "stop_token_ids_visible"), ("", unsupported([]))),
    },
    output={**OUTPUT, **dict.fromkeys(("logprobs", "prompt_logprobs"), ("", unsupported()))},
    extra=dict.fromkeys((*SAMPLING, "guided_decoding"), FRONTEND),
)


@dataclass(frozen=True)
class EchoRequest:
    """A request in the engine's own terms.

    :param text: the tokens to repeat.
    :param start: index of the next token in the endless repetition of ``text``.
    :param count: tokens to answer with.
    :param finish_reason: of the last chunk, ``stop`` or ``length``.
    """

    text: list[int]
    start: int
    count: int
    finish_reason: str

    @classmethod
    def parse(cls, request: Request) -> EchoRequest:
        """Read a request.

        Without ``max_tokens`` the text is sent once; with it, repeatedly until that many tokens are sent.

        :raises InvalidRequestError: it is too long or asks for something unsupported.
        """
        tokens: list[int] = request["token_ids"]
        sampling = section(request, "sampling_options")
        for name in _UNSUPPORTED:
            if sampling.get(name):
                raise InvalidRequestError(f"the echo engine does not support {name}")
        if sampling.get("n") is not None and integer("sampling_options.n", sampling["n"]) > 1:
            raise InvalidRequestError("the echo engine makes only one answer: n must be 1")
        if len(tokens) >= CONTEXT_LENGTH:
            raise InvalidRequestError(
                f"the prompt has {len(tokens)} tokens; the model's context length is {CONTEXT_LENGTH}"
            )
        try:
            split = len(tokens) - 1 - tokens[::-1].index(ANSWER_TOKEN)
            text, start = tokens[:split], len(tokens) - split - 1
        except ValueError:
            text, start = tokens, 0
        if not text:
            raise InvalidRequestError("there is nothing to echo: the prompt is empty")
        _TABLE.read(request, {})
        max_tokens = section(request, "stop_conditions").get("max_tokens")
        room = CONTEXT_LENGTH - len(tokens)
        if max_tokens is None:
            return cls(text, start, min(max(1, len(text) - start), room), "stop")
        return cls(text, start, min(max(0, integer("stop_conditions.max_tokens", max_tokens)), room), "length")

    def token(self, index: int) -> int:
        """Return the answer's token number ``index``."""
        return self.text[(self.start + index) % len(self.text)]


class EchoEngine(EngineLifecycle):
    """Generates in the worker process itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._model_name: str = args.model_name
        self._interval = 1.0 / args.tokens_per_second if args.tokens_per_second else 0.0
        self._start_seconds: float = args.start_seconds
        self._prefill_seconds: float = args.prefill_seconds
        self._steps = 0

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Wait for ``--start-seconds``."""
        await asyncio.sleep(self._start_seconds)
        return EngineInfo(
            model_name=self._model_name,
            model_path=str(MODEL_DIR),
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            kv_block_size=KV_BLOCK_SIZE,
        )

    async def generate(
        self,
        request: Request,
        context: RequestContext,  # noqa: ARG002 - part of the protocol
    ) -> AsyncIterator[Chunk]:
        """Yield the answer, one token a chunk, at ``--tokens-per-second``."""
        echo = EchoRequest.parse(request)
        if self._prefill_seconds:
            await self._prefill()
        text, start, last = echo.text, echo.start, echo.count - 1
        length = len(text)
        interval = self._interval
        due = time.monotonic()
        for index in range(last):
            yield {"token_ids": [text[(start + index) % length]], "index": 0}
            if interval:
                due += interval
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            else:
                await asyncio.sleep(0)
        final = [text[(start + last) % length]] if last >= 0 else []
        yield {"token_ids": final, "index": 0, "finish_reason": echo.finish_reason}

    async def _prefill(self) -> None:
        """Wait for ``--prefill-seconds``, in steps that :meth:`progress` counts."""
        end = time.monotonic() + self._prefill_seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))
            self._steps += 1

    async def abort(self, request_id: str) -> None:
        """Do nothing: cancelling the task ends the generation."""

    def processes(self) -> Iterable[int]:
        """Return no pids: the engine has no processes."""
        return ()

    def canary_request(self) -> Request:
        """Return a request for one token."""
        return {"token_ids": [ANSWER_TOKEN + 3, ANSWER_TOKEN], "stop_conditions": {"max_tokens": 1}}

    def progress(self) -> int:
        """Return the number of prefill steps taken."""
        return self._steps


class EchoProcessEngine(EchoEngine):
    """Generates in a process tree like those of the big engines (docs/design.md).

    The core process makes its rank process compute every step, and owns shared memory and files.
    """

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args)
        self._core = ChildProcess(
            "the echo engine",
            "dynamo_worker.engines.echo_process:Core",
            {"tokens_per_second": args.tokens_per_second, "private_dir": str(context.private_dir)},
        )

    async def start(self, worker_id: int) -> EngineInfo:
        """Start the process tree and wait until its rank runs."""
        await self._core.start()
        return await super().start(worker_id)

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Yield the tokens that the core process sends for this request."""
        echo = EchoRequest.parse(request)
        if self._prefill_seconds:
            await self._prefill()
        index = 0
        async for count, last in self._core.generate(context.id(), echo.count):
            tokens = [echo.token(index + offset) for offset in range(count)]
            index += count
            if last:
                yield {"token_ids": tokens, "index": 0, "finish_reason": echo.finish_reason}
            else:
                yield {"token_ids": tokens, "index": 0}

    async def abort(self, request_id: str) -> None:
        """Tell the core to drop the request."""
        await self._core.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the pids of the core and its rank."""
        core = self._core.processes()
        return (*core, self._core.info["rank_pid"]) if core and self._core.info else core

    def progress(self) -> int:
        """Return the number of steps of the core, and of prefills."""
        return self._steps + self._core.progress()

    async def check_health(self) -> None:
        """Raise EngineDeadError once the core has ended."""
        self._core.check()

    async def shutdown(self, deadline: Deadline) -> None:
        """Ask the core to end, and kill it at the deadline."""
        await self._core.shutdown(deadline)


class EchoPlugin(EnginePlugin):
    """The plugin of the echo engine."""

    dynamo_worker_api = "1.2"

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's flags."""
        group = parser.add_argument_group("echo engine", "Answers with the prompt; for tests, demos and benchmarks.")
        group.add_argument("--model-name", default="echo", metavar="NAME", help="name clients ask for (default: echo)")
        group.add_argument(
            "--tokens-per-second",
            type=non_negative,
            default=0.0,
            metavar="RATE",
            help="tokens per second of each request; 0 is as fast as possible (default: 0)",
        )
        group.add_argument(
            "--start-seconds", type=non_negative, default=0.0, metavar="S", help="duration of the start (default: 0)"
        )
        group.add_argument(
            "--prefill-seconds",
            type=non_negative,
            default=0.0,
            metavar="S",
            help="time before a request's first token (default: 0)",
        )
        group.add_argument(
            "--process-tree",
            action="store_true",
            help="generate in separate processes, as big engines do, instead of inside the worker",
        )

        group.add_argument(
            "--text",
            action="store_true",
            help="take and give text instead of tokens: the engine tokenizes, not the frontend",
        )
        group.add_argument(
            "--embedding",
            action="store_true",
            help="make embeddings: of tokens, or of text with --text; --tokens-per-second is how fast it reads",
        )

    @hookimpl
    def create_engine(
        self, args: argparse.Namespace, context: EngineContext
    ) -> EchoEngine | EchoTextEngine | EchoEmbeddingEngine:
        """Return the engine that the flags choose."""
        engine = EchoProcessEngine(args, context) if args.process_tree else EchoEngine(args)
        if args.embedding:
            from dynamo_worker.engines.echo_embedding import EchoEmbeddingEngine

            return EchoEmbeddingEngine(engine, args.model_name, takes_text=args.text)
        if not args.text:
            return engine
        from dynamo_worker.engines.echo_text import EchoTextEngine

        return EchoTextEngine(engine, args.model_name)


plugin = EchoPlugin()
