"""The model and its batches, in the engine's own process: transformers' continuous batching, started and fed.

The scheduling, the KV cache and the steps are transformers' (``ContinuousBatchingManager``), in a thread of its own.
Here is what surrounds them: the model is loaded, requests and aborts are handed over, and the new tokens are collected.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from dynamo_worker_transformers import adapters, sampler
from dynamo_worker_transformers.adapters import Adapters
from dynamo_worker_transformers.sampler import Logprobs, RequestSampler, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: On a CPU, the contexts that fit into the KV cache unless the operator sizes it, and the most tokens.
_CONTEXTS: Final = 8
_MOST_CACHED: Final = 65_536
#: On a CPU, the tokens per step unless the operator says otherwise: masks take this times the cache's tokens.
_STEP_TOKENS: Final = 512
#: Seconds that the loop gets to end its step.
_STOP_SECONDS: Final = 1.0
#: The parameters of ``generation_config.json`` that apply to requests which do not set them.
_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class LoadError(Exception):
    """The model cannot be served; the operator sees the message."""


class Update(NamedTuple):
    """What a step has done for one answer.

    :param tokens: the new ones.
    :param logprobs: theirs, if the request asked for them.
    :param finished: whether they are the last.
    :param error: why there are no more; None if all is well.
    """

    answer_id: str
    tokens: list[int]
    logprobs: list[Logprobs]
    finished: bool
    error: str | None


class Model(NamedTuple):
    """A loaded model.

    :param context_length: longest sequence in tokens that its files allow.
    :param end_ids: tokens that end an answer.
    :param first_id: a token with which prompts begin.
    :param defaults: recommended sampling parameters.
    """

    module: Any
    context_length: int
    end_ids: tuple[int, ...]
    first_id: int
    defaults: dict[str, Any]


class _Running:
    """An answer in the loop."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.sent = 0


def load(settings: Mapping[str, Any]) -> Model:
    """Load a model as the flags say (``arguments.py``); takes seconds to minutes.

    :raises LoadError: it cannot be loaded.
    """
    transformers.utils.logging.disable_progress_bar()
    path, trust = settings["model"], settings["trust_remote_code"]
    with explained(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        attention = settings["attn_implementation"]
        module, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=settings["dtype"],
            trust_remote_code=trust,
            output_loading_info=True,
            **({} if attention is None else {"attn_implementation": attention}),
        )
        if missing := sorted(report["missing_keys"]):
            raise LoadError(
                f"the weights of {path} are incomplete: {len(missing)} tensors are missing, as {missing[0]}"
            )
        module = module.to(settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    text, generation = config.get_text_config(), module.generation_config
    length = settings["max_model_len"] or getattr(text, "max_position_embeddings", None)
    if length is None:
        raise LoadError(f"config.json of {path} states no context length: set --max-model-len")
    end = generation.eos_token_id
    ends = tuple(end) if isinstance(end, (list, tuple)) else () if end is None else (int(end),)
    begin = (generation.bos_token_id, getattr(text, "bos_token_id", None), *ends, 0)
    given = generation.to_diff_dict()
    return Model(
        module,
        int(length),
        ends,
        next(token for token in begin if isinstance(token, int)),
        {name: given[name] for name in _DEFAULTS if given.get(name) is not None},
    )


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Make one sentence of what transformers and PyTorch raise for a model that they cannot load."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # model code of any origin runs here
        text = str(error).strip() or type(error).__name__
        if _out_of_memory(error):
            raise LoadError(f"{path} does not fit into memory: {text}") from error
        raise LoadError(f"cannot load {path}: {text}") from error


def _out_of_memory(error: Exception) -> bool:
    # The second text is transformers' own, from its plan of the KV cache.
    texts = ("can't allocate memory", "is more than available memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


class Batches:
    """A model in transformers' batching loop. Its methods are called by one thread, which is not the loop's.

    :ivar adapters: the LoRA adapters; None if the engine serves none.
    :ivar context_length: longest sequence in tokens that the model and the KV cache allow.
    :ivar vocabulary: number of token ids.
    """

    def __init__(self, model: Model, settings: Mapping[str, Any]) -> None:
        """Allocate the KV cache, start the loop, and make one request.

        :raises LoadError: there is no memory for it, or transformers cannot batch this model.
        """
        self._model = model
        self._running: dict[str, _Running] = {}
        module = model.module
        self.vocabulary = int(module.get_input_embeddings().num_embeddings)
        self.adapters = Adapters(module) if settings["enable_lora"] else None
        version = f"transformers {transformers.__version__}"
        try:
            self._manager = module.init_continuous_batching(
                # The sampler leaves the choice at the maximum; answers end as their requests say.
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
                continuous_batching_config=_config(module, model.context_length, settings),
            )
            self._manager.logit_processor = sampler.processors(RequestSampler(), self.adapters)
            self._manager.warmup()
            cache = self._manager.batch_processor.cache
            self.context_length = min(model.context_length, infer_max_single_request_tokens(cache))
            self._manager.start()
            self._first_request()
        except LoadError:
            raise
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            if _out_of_memory(error):
                raise LoadError(f"there is no memory for the KV cache: {text}") from error
            raise LoadError(f"{version} cannot batch this model ({type(module).__name__}): {text}") from error

    def _first_request(self) -> None:
        """Make a request whose failure would otherwise look like that of a client's."""
        self.add("first", [self._model.first_id], 1, (), {"temperature": 0.0})
        while self._running:
            for update in self.updates(1.0):
                if update.error is not None:
                    raise RuntimeError(update.error)
            if (error := self.failure()) is not None:
                raise error

    # ----------------------------------------------------------------------------------------------------- properties

    @property
    def module(self) -> Any:
        """The model itself."""
        return self._model.module

    @property
    def config(self) -> ContinuousBatchingConfig:
        """The settings of the loop, with the sizes that it has chosen."""
        return self._manager.continuous_batching_config

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        return int(getattr(self._manager, "current_batch", 0))

    @property
    def shares_prefixes(self) -> bool:
        """Whether requests share the KV blocks of equal prefixes."""
        return bool(self._manager.batch_processor.cache.use_prefix_sharing)

    def used_blocks(self) -> int:
        """Return the number of KV blocks in use."""
        free: float = self._manager.batch_processor.cache.compute_free_capacity()
        blocks: int = self.config.num_blocks
        return math.ceil((1.0 - free) * blocks - 1e-6)

    def failure(self) -> BaseException | None:
        """Return why the loop has ended; None while it runs."""
        error: BaseException | None = self._manager.background_thread_status.fatal_error
        if error is None and not self._manager.is_running():
            error = RuntimeError("the batching loop has ended without an error")
        return error

    # ------------------------------------------------------------------------------------------------------- requests

    def add(
        self,
        answer_id: str,
        prompt: Sequence[int],
        limit: int,
        ends: Sequence[int],
        parameters: Mapping[str, Any],
        adapter: int | None = None,
    ) -> None:
        """Begin one answer.

        :param answer_id: no other answer has it, nor had: what the loop still does for a cancelled one bears its id.
        :param limit: most tokens.
        :param ends: tokens that end it.
        :param parameters: as :class:`~dynamo_worker_transformers.sampler.Sampling` takes them.
        :param adapter: number of its LoRA adapter.
        """
        sampling = Sampling({**parameters, "ends": ends}, self.module.device)
        own = {} if adapter is None else {adapters.KEY: adapter}
        self._running[answer_id] = _Running(sampling)
        self._manager.add_request(
            prompt, answer_id, max_new_tokens=limit, streaming=True, eos_token_id=[*ends] or [-1],
            **{sampler.KEY: sampling}, **own,
        )  # fmt: skip

    def cancel(self, answer_id: str) -> None:
        """Stop an answer before the next step. Nothing is reported for it any more."""
        if self._running.pop(answer_id, None) is not None:
            self._manager.cancel_request(answer_id)

    def updates(self, seconds: float) -> list[Update]:
        """Return what the loop has reported; wait so long if there is nothing."""
        output = self._manager.get_result(timeout=seconds)
        found = []
        while output is not None:
            update = self._update(output)
            if update is not None:
                found.append(update)
            queue = self._manager.output_router.output_queue
            output = None if queue.empty() else self._manager.get_result(timeout=0)
        return found

    def _update(self, output: Any) -> Update | None:
        answer_id, over = output.request_id, output.is_finished()
        running = self._running.get(answer_id)
        if running is None:
            if not over:  # it was cancelled while the loop was reading it
                self._manager.cancel_request(answer_id)
            return None
        if over:
            del self._running[answer_id]
        tokens = output.generated_tokens[running.sent :]
        running.sent += len(tokens)
        wanted = running.sampling.logprobs
        logprobs = [wanted.popleft() for _ in tokens] if running.sampling.top_logprobs is not None else []
        return Update(answer_id, tokens, logprobs, over, output.error)

    # -------------------------------------------------------------------------------------------------------- the end

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[Any]:
        """Keep the loop between two steps, for changes of the model."""
        with self._manager.pause():
            yield self.module

    def stop(self) -> None:
        """End the loop."""
        self._manager.stop(hard_stop=True, timeout=_STOP_SECONDS)


def _config(module: Any, context_length: int, settings: Mapping[str, Any]) -> ContinuousBatchingConfig:
    page, blocks, tokens = settings["page_size"], settings["num_blocks"], settings["max_batch_tokens"]
    share, memory = settings["prefix_sharing"], settings["max_memory_percent"]
    if module.device.type == "cpu" and memory is None:
        # transformers would take 60 % of the machine's memory.
        most = max(context_length, min(_CONTEXTS * context_length, _MOST_CACHED))
        blocks, tokens = blocks or math.ceil(most / page), tokens or _STEP_TOKENS
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=blocks,
        max_batch_tokens=tokens,
        max_memory_percent=memory,
        max_requests_per_batch=settings["max_requests_per_batch"],
        # What an adapter has computed is wrong for the others.
        allow_block_sharing=share and not settings["enable_lora"],
        per_request_processors=True,
        # The sampler goes by what has been chosen, and by Python objects, which graphs do not have.
        use_async_batching=False,
        use_cuda_graph=False,
        max_blocks_per_request=0,
    )
