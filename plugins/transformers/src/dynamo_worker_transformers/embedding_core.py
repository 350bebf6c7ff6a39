"""The engine that makes embeddings in its own process: between the worker's messages and the model."""

from __future__ import annotations

import base64
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit.child_loop import StepEngine
from dynamo_worker_transformers.batches import LoadError
from dynamo_worker_transformers.embedding_model import EmbeddingModel

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Tokens in a batch, padding included, unless the operator says otherwise: on a CPU and on a GPU.
_CPU_TOKENS: Final = 512
_TOKENS: Final = 8192
#: Most inputs in a batch, unless the operator says otherwise.
_INPUTS: Final = 256


class _Request:
    """A request in progress."""

    def __init__(self, request_id: str, payload: Mapping[str, Any]) -> None:
        self.request_id = request_id
        self.inputs: list[str | list[int]] = payload["inputs"]
        self.dimensions: int | None = payload["dimensions"]
        self.limit: int | None = payload["truncate_prompt_tokens"]
        self.special: bool | None = payload["add_special_tokens"]
        #: The input that is next, and its tokens once they are known.
        self.next = 0
        self.tokens: list[int] | None = None


class EmbeddingCore(StepEngine):
    """The engine, as the worker's messages drive it. A step is a batch, with inputs of all requests in turn."""

    def __init__(self) -> None:
        self._loaded: EmbeddingModel | None = None
        self._most_tokens = 0
        self._most_inputs = 0
        #: The requests with inputs that are in no batch yet; the first one's turn is next.
        self._waiting: deque[_Request] = deque()
        self._running: dict[str, _Request] = {}

    @property
    def _model(self) -> EmbeddingModel:
        assert self._loaded is not None, "no requests come before the start"
        return self._loaded

    def start(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model, and return what the worker tells frontends."""
        print(f"Loading the model {options['model']}", flush=True)
        begun = time.monotonic()
        try:
            model = self._loaded = EmbeddingModel(options)
        except LoadError as error:
            sys.exit(str(error))
        print(f"Model loaded after {time.monotonic() - begun:.1f} s on {model.device}", flush=True)
        tokens = _CPU_TOKENS if model.device.type == "cpu" else _TOKENS
        self._most_tokens = options["max_batch_tokens"] or tokens
        self._most_inputs = options["max_requests_per_batch"] or _INPUTS
        return {
            "context_length": model.context_length,
            "vocab_size": model.vocabulary,
            "dimensions": model.dimensions,
            "shorter": model.shorter,
            "pooling": model.recipe.pooling,
            "normalize": model.recipe.normalize,
            "batch_tokens": self._most_tokens,
            "batch_inputs": self._most_inputs,
        }

    def add(self, request_id: str, payload: Mapping[str, Any]) -> None:
        """Begin a request."""
        self._running[request_id] = request = _Request(request_id, payload)
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._running.pop(request_id, None)

    def step(self) -> float | None:
        """Make the vectors of one batch."""
        batch = self._batch()
        if not batch:
            return None
        vectors = self._model.vectors([tokens for _, _, tokens in batch])
        for (request, index, tokens), vector in zip(batch, vectors, strict=True):
            chunk = {
                "index": index,
                "tokens": len(tokens),
                "vector": base64.b64encode(self._model.finished(vector, request.dimensions)).decode("ascii"),
            }
            last = index == len(request.inputs) - 1
            if last:
                self._running.pop(request.request_id, None)
            self.send(request.request_id, chunk, last=last)
        return None

    def _batch(self) -> list[tuple[_Request, int, list[int]]]:
        """Return inputs of the requests in turn, each with its request, its number and its tokens; at least one.

        All inputs take as much as the longest.
        """
        batch: list[tuple[_Request, int, list[int]]] = []
        longest = 0
        while self._waiting and len(batch) < self._most_inputs:
            request = self._waiting.popleft()
            if self._running.get(request.request_id) is not request:
                continue
            tokens = self._tokens(request)
            if tokens is None:
                continue
            longest = max(longest, len(tokens))
            if batch and longest * (len(batch) + 1) > self._most_tokens:
                self._waiting.appendleft(request)
                break
            batch.append((request, request.next, tokens))
            request.next, request.tokens = request.next + 1, None
            if request.next < len(request.inputs):
                self._waiting.append(request)
        return batch

    def _tokens(self, request: _Request) -> list[int] | None:
        """Return the tokens of a request's next input; None if they cannot be taken, which ends the request."""
        if request.tokens is None:
            try:
                request.tokens = self._model.tokens(request.inputs[request.next], request.limit, request.special)
            except Exception as error:  # the tokenizer's, of a text that it cannot take: not the end of the engine
                self.abort(request.request_id)
                self.fail(request.request_id, error)
        return request.tokens

    def answer(self, question: str, payload: Any) -> Any:
        """Say how much there is to do."""
        return {"requests": len(self._running)} if question == "load" else super().answer(question, payload)
