"""The engine that makes embeddings: vLLM runs a pooling model, once over each input of a request.

A request becomes as many of vLLM's as it has inputs, all under its own id. No task is started for any of them: they are
submitted in one go, so that vLLM batches them, and their mailboxes are read in order.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dynamo.llm.exceptions import Disconnected
from vllm import PoolingParams, envs
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input

from dynamo_worker import EngineInfo, InvalidRequestError, StartError
from dynamo_worker.embeddings import EmbeddingSpec
from dynamo_worker.engine import LocalContext
from dynamo_worker.kit import forward_pass_metrics
from dynamo_worker.logs import get_logger
from dynamo_worker_vllm import disaggregation
from dynamo_worker_vllm.control import lora_request
from dynamo_worker_vllm.engine import Started, VllmEngine, translated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

    from dynamo_worker import RequestContext
    from dynamo_worker.embeddings import EmbeddingAnswer, EmbeddingRequest
    from dynamo_worker.engine import Send
    from dynamo_worker.kit.publishing import KvEvents

log = get_logger(__name__)

#: vLLM's name of what this engine does.
_TASK: Final = "embed"
#: Inputs that are submitted before the event loop may do something else: about a millisecond.
_BURST: Final = 16
#: Texts that are tokenized before those of another request may be. One thread tokenizes.
_TEXTS: Final = 32
#: What a request may say about the tokenization of its texts, by vLLM's names.
_TOKENIZATION: Final = ("truncate_prompt_tokens", "add_special_tokens")


class Role(disaggregation.Role):
    """The only role of a worker that makes embeddings."""

    @property
    def endpoint_types(self) -> tuple[str, ...]:
        """The OpenAI APIs it serves."""
        return ("embedding",)


class VllmEmbeddingEngine(VllmEngine):
    """vLLM with a pooling model."""

    ROLE: ClassVar = Role

    #: Numbers in a vector, as the model has shown.
    _dimensions = 0

    def prepare(self, config: VllmConfig) -> None:  # noqa: ARG002 - of the base class
        """Say what there is nothing to publish about."""
        if forward_pass_metrics.wanted(self.args):
            log.warning("Forward-pass metrics are not published: they describe schedulers of models that generate")

    async def warm_up(self) -> None:
        """Check that the model makes embeddings, and find out of what size.

        :raises StartError: it does not.
        """
        started = self.started
        tasks = await started.llm.get_supported_tasks()
        if _TASK not in tasks:
            raise StartError(
                f"{started.config.model_config.model} makes no embeddings: vLLM runs it for {', '.join(tasks)}",
                hint="choose another model, or name what it has to become with --convert embed",
            )
        answer = await self._embed(started, self.canary_request(), LocalContext("warm-up"), None)
        self._dimensions = len(answer["embeddings"][0]) // 4
        # vLLM looks up its environment variables for every request; from now on they do not change.
        envs.enable_envs_cache()

    def describe(self, started: Started) -> EngineInfo:
        """Return the properties of the model and its vectors."""
        model = started.config.model_config
        shorter = (model.matryoshka_dimensions or True) if model.is_matryoshka else False
        return replace(
            super().describe(started),
            model_input="tokens" if self.args.embedding_frontend_tokenization else "text",
            embeddings=EmbeddingSpec(self._dimensions, shorter),
        )

    def kv_events(self, started: Started) -> KvEvents | None:  # noqa: ARG002 - of the base class
        """Return None: frontends do not route embeddings by prefix."""
        return None

    def canary_request(self) -> Any:
        """Return a request for the embedding of the canary's tokens."""
        tokens = super().canary_request()["token_ids"]
        return {"model": self._served_names(self.started.config)[0], "inputs": [list(tokens)]}

    async def push(self, request: Any, context: RequestContext, send: Send) -> None:
        """Answer one request (:mod:`dynamo_worker.embeddings`)."""
        started = self.started
        started.control.weights.check_usable()
        with started.control.lora_adapter(request) as adapter:
            answer: Any = await self._embed(
                started, request, context, None if adapter is None else lora_request(adapter)
            )
        send(answer)

    async def _embed(
        self, started: Started, request: EmbeddingRequest, context: RequestContext, lora: LoRARequest | None
    ) -> EmbeddingAnswer:
        """Let vLLM run the model over each input, and return the vectors.

        :raises InvalidRequestError: vLLM rejects an input.
        """
        llm = started.llm
        try:
            inputs = await self._tokenized(started, request)
            params = PoolingParams(task=_TASK, dimensions=request.get("dimensions"))
            mailboxes = []
            for number, tokens in enumerate(inputs, 1):
                mailboxes.append(
                    await llm.add_request(
                        context.id(), tokens, params, lora_request=lora, trace_headers=context.trace_headers()
                    )
                )
                if not number % _BURST:
                    await asyncio.sleep(0)
            outputs = [mailbox.get_nowait() or await mailbox.get() for mailbox in mailboxes]
        except InvalidRequestError:
            raise
        except ValueError as error:  # vLLM rejects a request with this, or with its own errors
            raise InvalidRequestError(str(error)) from error
        except Exception as error:
            raise translated(error) from error
        vectors = [output.outputs.data for output in outputs]
        if not all(vector.numel() for vector in vectors):
            raise Disconnected("vLLM ended the request: aborted")
        return {
            "embeddings": [vector.float().numpy().tobytes() for vector in vectors],
            "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        }

    async def _tokenized(self, started: Started, request: EmbeddingRequest) -> Sequence[Any]:
        """Return the inputs as vLLM takes them.

        :raises VLLMValidationError: a text is too long.
        """
        inputs = request["inputs"]
        texts = [number for number, one in enumerate(inputs) if isinstance(one, str)]
        ready: list[Any] = [None if isinstance(one, str) else tokens_input(one) for one in inputs]
        if not texts:
            return ready
        renderer = started.llm.renderer
        options = {name: request[name] for name in _TOKENIZATION if name in request}
        params = renderer.default_cmpl_tok_params.with_kwargs(**options)
        loop = asyncio.get_running_loop()

        def tokenize(numbers: Sequence[int]) -> None:
            number = numbers[0]
            try:
                for number in numbers:
                    (ready[number],) = renderer.render_cmpl([{"prompt": inputs[number]}], params)
            except VLLMValidationError as error:
                raise InvalidRequestError(f"input[{number}]: {error}") from error

        for first in range(0, len(texts), _TEXTS):
            # vLLM's own thread: a tokenizer is not safe in several, as each may set it to cut texts elsewhere.
            await loop.run_in_executor(renderer._executor, tokenize, texts[first : first + _TEXTS])  # noqa: SLF001
        return ready
