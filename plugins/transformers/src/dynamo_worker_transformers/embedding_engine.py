"""The engine in the worker that makes embeddings: starts the process with the model, and puts its vectors together."""

from __future__ import annotations

import base64
import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, Final

from prometheus_client import CollectorRegistry

from dynamo_worker import EngineInfo
from dynamo_worker.embeddings import EmbeddingSpec
from dynamo_worker.kit import engine_arguments
from dynamo_worker.kit.child_process import ChildProcess
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
from dynamo_worker.logs import get_logger
from dynamo_worker_transformers import arguments
from dynamo_worker_transformers.metrics import EmbeddingMetrics

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterable

    from dynamo_worker import Deadline, RequestContext
    from dynamo_worker.embeddings import EmbeddingAnswer

log = get_logger(__name__)

#: What the process has to know of a request beside its inputs.
_FIELDS: Final = ("dimensions", "truncate_prompt_tokens", "add_special_tokens")


class TransformersEmbeddingEngine(EngineLifecycle):
    """A model of transformers whose hidden states become embeddings."""

    NAME: ClassVar = "transformers"

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._child = ChildProcess(
            self.NAME,
            "dynamo_worker_transformers.embedding_core:EmbeddingCore",
            arguments.embedding_settings(args),
            # Otherwise processes of the tokenizer's library warn about forks.
            environment={"TOKENIZERS_PARALLELISM": "false"},
        )
        self._metrics = EmbeddingMetrics()
        self._name = self._args.model

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the process, wait until the model is loaded, and say what it makes.

        Texts come as they are: frontends leave out the special tokens that such models are trained with.
        """
        log.info("Starting transformers", model=self._args.model)
        model = await self._child.start()
        log.info(
            "Model makes embeddings",
            pooling=model["pooling"], normalize=model["normalize"], dimensions=model["dimensions"],
        )  # fmt: skip
        names = engine_arguments.served_names(self._args.served_model_name) or [self._args.model]
        self._name, *aliases = names
        return EngineInfo(
            model_name=self._name,
            model_aliases=aliases,
            model_path=self._args.model,
            endpoint_types=("embedding",),
            model_input="text",
            embeddings=EmbeddingSpec(model["dimensions"], model["shorter"]),
            context_length=model["context_length"],
            vocab_size=model["vocab_size"],
            max_num_seqs=model["batch_inputs"],
            max_num_batched_tokens=model["batch_tokens"],
        )

    async def generate(self, request: Any, context: RequestContext) -> AsyncIterator[Any]:
        """Yield the answer once the process has sent all vectors."""
        payload = {"inputs": request["inputs"], **{name: request.get(name) for name in _FIELDS}}
        vectors: list[bytes] = []
        tokens = 0
        self._metrics.running += 1
        try:
            async with contextlib.aclosing(self._child.generate(context.id(), payload)) as chunks:
                async for chunk in chunks:
                    vectors.append(base64.b64decode(chunk["vector"]))
                    tokens += chunk["tokens"]
        finally:
            self._metrics.running -= 1
        self._metrics.requests += 1
        self._metrics.inputs += len(vectors)
        self._metrics.tokens += tokens
        answer: EmbeddingAnswer = {"embeddings": vectors, "prompt_tokens": tokens}
        yield answer

    async def abort(self, request_id: str) -> None:
        """Take a request's inputs out of the next batches."""
        await self._child.abort(request_id)

    def processes(self) -> Iterable[int]:
        """Return the pid of the process with the model."""
        return self._child.processes()

    def canary_request(self) -> Any:
        """Return a request with one token."""
        return {"model": self._name, "inputs": [[0]]}

    def progress(self) -> int:
        """Return the number of steps that the process has reported."""
        return self._child.progress()

    async def check_health(self) -> None:
        """Check that the process serves.

        :raises EngineDeadError: it has ended.
        """
        if self._child.info is not None:
            self._child.check()

    def metrics_registry(self) -> CollectorRegistry:
        """Return the engine's metrics."""
        registry = CollectorRegistry()
        registry.register(self._metrics)
        return registry

    async def shutdown(self, deadline: Deadline) -> None:
        """End the process."""
        await self._child.shutdown(deadline)
