"""The adapter: the engine protocol of dynamo-worker on one side, the engine's own process on the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_worker import EngineInfo, InvalidRequestError
from dynamo_worker.kit import fields
from dynamo_worker.kit.child_process import ChildProcess
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
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
    """The core process, and the requests that it answers."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        self._name = args.served_model_name
        self._core = ChildProcess(
            "the reverse engine",
            "dynamo_worker_reverse.core:Core",
            {
                "tokens_per_second": args.tokens_per_second,
                "usage_file": None if args.usage_file is None else str(args.usage_file),
            },
            directory=context.private_dir,
        )

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the core and wait until it is ready."""
        await self._core.start()
        return EngineInfo(
            model_name=self._name,
            model_path=str(MODEL_DIR),
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
        )

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Yield the prompt backwards, one token a chunk."""
        wanted = ReverseRequest.parse(request)
        reason = "stop" if wanted.count is None else "length"
        async for tokens, last in self._core.generate(context.id(), vars(wanted)):
            chunk: Chunk = {"token_ids": tokens, "index": 0}
            if last:
                chunk["finish_reason"] = reason
            yield chunk

    async def abort(self, request_id: str) -> None:
        """Tell the core to forget a request."""
        await self._core.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the core's pid."""
        return self._core.processes()

    # --- What an engine may offer beyond the protocol

    def canary_request(self) -> Request:
        """Return a request for one token: for the warm-up, and to find out whether a silent engine is alive."""
        return {"token_ids": [36, ANSWER_TOKEN], "stop_conditions": {"max_tokens": 1}}

    def progress(self) -> int:
        """Return the number of steps the core has reported."""
        return self._core.progress()

    # --- The lifecycle hooks

    async def check_health(self) -> None:
        """Return when the core has answered a ping; without an answer the hook times out.

        :raises EngineDeadError: the core has ended.
        """
        await self._core.check_health()

    async def drain(self, deadline: Deadline) -> None:  # noqa: ARG002 - the hook is cancelled at the deadline
        """Have the core write its usage records, which no request in flight shows."""
        await self._core.ask("flush")

    async def shutdown(self, deadline: Deadline) -> None:
        """Ask the core to end, kill it shortly before the deadline, and wait for it."""
        await self._core.shutdown(deadline)
