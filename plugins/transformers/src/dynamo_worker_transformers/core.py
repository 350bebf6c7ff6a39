"""The engine in its own process: between the worker's messages and the batches.

The worker's kit (``dynamo_worker.kit.child_process``) starts it, and ends it with the worker.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.child_loop import StepEngine
from dynamo_worker.kit.chunks import finite, top_logprob, usage
from dynamo_worker_transformers.batches import Batches, LoadError, load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker import Chunk
    from dynamo_worker_transformers.batches import Update
    from dynamo_worker_transformers.sampler import Logprobs

#: Seconds that a step waits for new tokens; requests and aborts wait as long at the most.
_WAIT_SECONDS: Final = 0.01
#: A pause, in seconds, that only says that nothing has happened.
_NOTHING: Final = 0.0005
#: Seconds until a loop that has failed a request has said whether it has ended.
_END_SECONDS: Final = 1.0


class _Request:
    """A request in progress, with all its answers.

    :ivar running: those that have not ended: their ids in the loop by their indices.
    """

    def __init__(self, request_id: str, number: int, payload: Mapping[str, Any]) -> None:
        self.id = request_id
        self.prompt_tokens = len(payload["token_ids"])
        self.ends = frozenset(payload["ends"])
        self.stops = frozenset(payload["stop_token_ids"])
        self.logprobs = payload["sampling"].get("logprobs") is not None
        # The loop hears of aborts late, and reports what it had done before: no other request may have these ids.
        self.running = {index: f"{number}/{index}" for index in range(payload["n"])}
        self.tokens = 0

    def chunk(self, index: int, update: Update) -> Chunk:
        """Return what one answer has got."""
        chunk: Chunk = {"token_ids": update.tokens, "index": index}
        self.tokens += len(update.tokens)
        if self.logprobs:
            chunk["log_probs"] = [finite(each.chosen) for each in update.logprobs]
            chunk["top_logprobs"] = [_top(each) for each in update.logprobs]
        if update.finished:
            del self.running[index]
            last = update.tokens[-1] if update.tokens else None
            chunk["finish_reason"] = "stop" if last in self.ends else "length"
            if last is not None and last in self.stops:
                chunk["stop_reason"] = last
            chunk["completion_usage"] = usage(self.prompt_tokens, self.tokens, None)
        return chunk


def _top(position: Logprobs) -> list[Any]:
    """Return the likeliest tokens at a position; the frontend decodes them."""
    pairs = zip(position.tokens, position.values, strict=True)
    return [top_logprob(token, value, rank, None) for rank, (token, value) in enumerate(pairs, 1)]


class Core(StepEngine):
    """The engine, as the worker's messages drive it."""

    def __init__(self) -> None:
        self._loaded: Batches | None = None
        self._requests: dict[str, _Request] = {}
        #: Each answer in the loop: its request and its index.
        self._answers: dict[str, tuple[_Request, int]] = {}
        self._numbers = itertools.count()
        self._steps = 0

    @property
    def _batches(self) -> Batches:
        assert self._loaded is not None, "no requests come before the start"
        return self._loaded

    def start(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model, and return what the worker tells routers and translates requests by."""
        print(f"Loading the model {options['model']}", flush=True)
        begun = time.monotonic()
        try:
            model = load(options)
            print(f"Model loaded after {time.monotonic() - begun:.1f} s on {model.module.device}", flush=True)
            batches = self._loaded = Batches(model, options)
        except LoadError as error:
            sys.exit(str(error))
        config = batches.config
        return {
            "context_length": batches.context_length,
            "vocab_size": batches.vocabulary,
            "end_ids": model.end_ids,
            "first_id": model.first_id,
            "sampling": model.defaults,
            "page_size": config.page_size,
            "blocks": config.num_blocks,
            "sequences": config.max_requests_per_batch,
            "batch_tokens": config.max_batch_tokens,
            "prefix_sharing": batches.shares_prefixes,
        }

    def add(self, request_id: str, payload: Mapping[str, Any]) -> None:
        """Begin all answers of a request."""
        request = self._requests[request_id] = _Request(request_id, next(self._numbers), payload)
        try:
            for index, answer_id in request.running.items():
                sampling = dict(payload["sampling"])
                if sampling.get("seed") is not None:
                    sampling["seed"] += index
                self._batches.add(
                    answer_id,
                    payload["token_ids"],
                    payload["max_tokens"],
                    payload["ends"],
                    sampling,
                    payload["adapter"],
                )
                self._answers[answer_id] = request, index
        except Exception:
            self.abort(request_id)
            raise

    def step(self) -> float | None:
        """Send what the loop has made.

        :raises RuntimeError: the loop has ended.
        """
        updates = self._batches.updates(_WAIT_SECONDS)
        if any(update.error is not None for update in updates):
            self._check(_END_SECONDS)
        for update in updates:
            self._send(update)
        if not updates:
            self._check()
        before, self._steps = self._steps, self._batches.steps
        return None if updates or self._steps != before else _NOTHING

    def _send(self, update: Update) -> None:
        found = self._answers.get(update.answer_id)
        if found is None:
            return
        request, index = found
        if update.error is not None:
            self.abort(request.id)
            self.fail(request.id, update.error)
            return
        chunk = request.chunk(index, update)
        if update.finished:
            del self._answers[update.answer_id]
        if not request.running:
            del self._requests[request.id]
        self.send(request.id, chunk, last=not request.running)

    def _check(self, seconds: float = 0.0) -> None:
        """Raise why the loop has ended, if it has or does so within some seconds."""
        until = time.monotonic() + seconds
        while (error := self._batches.failure()) is None and time.monotonic() < until:
            time.sleep(_WAIT_SECONDS)
        if error is not None:
            raise RuntimeError(f"transformers' batching loop has failed: {error}") from error

    def abort(self, request_id: str) -> None:
        """Stop all answers of a request before the next step."""
        request = self._requests.pop(request_id, None)
        for answer_id in () if request is None else request.running.values():
            self._answers.pop(answer_id, None)
            self._batches.cancel(answer_id)

    def answer(self, question: str, payload: Any) -> Any:
        """Load or unload a LoRA adapter, or say how much there is to do."""
        batches = self._batches
        if question == "load":
            return {"requests": len(self._requests), "blocks": batches.used_blocks()}
        adapters = batches.adapters
        if adapters is None:
            raise InvalidRequestError("the engine serves no LoRA adapters: start it with --enable-lora")
        with batches.at_rest():
            if question == "load_lora":
                adapters.load(payload["number"], payload["path"])
            else:
                adapters.unload(payload["number"])
        return None

    def close(self) -> None:
        """End the loop."""
        if self._loaded is not None:
            self._loaded.stop()
