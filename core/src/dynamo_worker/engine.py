"""The engine protocol: what an engine adapter provides, called directly on the hot path (never through pluggy)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dynamo_worker.allowed_paths import AllowedPaths

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo.runtime import Endpoint
    from prometheus_client import CollectorRegistry

#: A request as the Dynamo frontend sends it: ``PreprocessedRequest`` of Dynamo 1.6.1. ``token_ids`` is always a
#: list of ints here (the core unpacks the packed-bytes form).
Request = dict[str, Any]

#: One piece of a response: ``LLMEngineOutput`` of Dynamo 1.6.1. ``token_ids`` holds the new tokens only; the last
#: chunk of a request carries ``finish_reason``.
Chunk = dict[str, Any]


class RequestContext(Protocol):
    """The part of ``dynamo.runtime.Context`` that engines use."""

    def id(self) -> str:
        """Return the request id, unique in the cluster."""

    def is_stopped(self) -> bool:
        """Return whether the client is gone or the request was cancelled."""

    def trace_headers(self) -> dict[str, str] | None:
        """Return the W3C trace headers to hand to the engine, or None."""


class LocalContext:
    """The context of a request made inside the worker: a warm-up, a canary, a test."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def id(self) -> str:
        """Return the request id."""
        return self._request_id

    def is_stopped(self) -> bool:
        """Return False: only the worker itself can stop it, and does so by cancelling its task."""
        return False

    def trace_headers(self) -> dict[str, str] | None:
        """Return None: there is no caller to trace back to."""
        return None


class Discovery(Protocol):
    """The worker's entries in Dynamo's discovery, for an engine that changes them while it serves.

    The worker puts back what vanishes from discovery unasked, so an engine changes its entries through this alone.
    Every call may fail with whatever the Dynamo runtime raises. Before the model is registered, and after the worker
    has begun to stop, the calls do nothing.
    """

    async def withdraw(self) -> None:
        """Take the worker's endpoint out of discovery: routers send no new requests."""

    async def rejoin(self) -> None:
        """Put the endpoint back."""

    async def register_adapter(self, name: str) -> None:
        """Register a LoRA adapter as a model of its own."""

    async def unregister_adapter(self, name: str) -> None:
        """Take the model of a LoRA adapter out of discovery."""


class Undiscovered:
    """The discovery of an engine that runs without a cluster: nothing happens."""

    async def withdraw(self) -> None:
        """Do nothing."""

    async def rejoin(self) -> None:
        """Do nothing."""

    async def register_adapter(self, name: str) -> None:
        """Do nothing."""

    async def unregister_adapter(self, name: str) -> None:
        """Do nothing."""


#: A control operation: takes the JSON object of a request and returns that of the answer. The message of what it raises
#: becomes the answer.
Operation = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

#: Turns one request into its stream of chunks.
Generate = Callable[[Request, RequestContext], AsyncIterator[Chunk]]

#: Takes one chunk for the client, on the event loop; never blocks. The chunk must not be changed afterwards. Raises
#: what an earlier chunk has ended with: RuntimeError if the client is gone or does not read, ValueError if that chunk
#: could not be encoded.
Send = Callable[[Chunk], None]


@dataclass(frozen=True)
class EngineContext:
    """What the core tells an engine about its surroundings when it is created.

    :param component: Dynamo path of the worker, ``namespace.component``.
    :param private_dir: a directory that dies with the worker, for sockets and temporary files.
    :param supervised: whether a supervisor outside of this process cleans up after it.
    :param allowed_paths: the directories that operations may load from and write to: what a request names, has to pass
        through it.
    :param events_wanted: whether a router may read KV events and load. Without one, nothing is published: every
        publisher of Dynamo's opens a port.
    :param discovery: the worker's entries in discovery.
    """

    component: str
    private_dir: Path
    supervised: bool
    allowed_paths: AllowedPaths = field(default_factory=AllowedPaths)
    events_wanted: bool = True
    discovery: Discovery = field(default_factory=Undiscovered)


@dataclass(frozen=True)
class EndpointSpec:
    """One Dynamo endpoint served by the engine.

    :param name: last part of ``namespace.component.endpoint``.
    :param generate: the function that answers its requests; the engine's own ``generate`` when None.
    :param graceful_shutdown: whether requests in flight may finish during the drain (True), or are ended with a
        migratable error as soon as the drain starts (False).
    :param metrics_labels: extra labels on the runtime's own metrics of this endpoint.
    :param registers_model: whether the model is registered on this endpoint.
    :param takes_tokens: whether its requests carry a prompt as ``token_ids``, which is checked before the engine sees
        them; operations on the engine itself take any object.
    """

    name: str
    generate: Generate | None = None
    graceful_shutdown: bool = True
    metrics_labels: Sequence[tuple[str, str]] = ()
    registers_model: bool = False
    takes_tokens: bool = True


@dataclass(frozen=True)
class EngineInfo:
    """What a started engine tells routers and frontends about itself; unknown values stay None.

    :param model_name: name under which clients ask for the model.
    :param model_path: directory with ``config.json`` and the tokenizer, or a hub name; None registers no model
        (a headless rank of a multi-node engine).
    :param model_aliases: further names of the same model.
    :param endpoint_types: OpenAI surfaces, names of ``dynamo.llm.ModelType`` members in lower case.
    :param worker_type: ``aggregated``, ``prefill``, ``decode`` or ``encode``.
    :param needs: peers without which this worker cannot serve: a list of alternatives, each a list of worker types.
    :param context_length: longest sequence in tokens.
    :param vocab_size: the first token id that the engine does not know, added tokens and placeholders counted: prompts
        with it or a higher one are refused before they reach the engine. None leaves them to the engine.
    :param kv_block_size: tokens in one KV-cache block.
    :param total_kv_blocks: KV-cache blocks per data-parallel rank.
    :param max_num_seqs: most sequences in one batch.
    :param max_num_batched_tokens: most tokens in one batch.
    :param data_parallel_start_rank: first data-parallel rank served here.
    :param data_parallel_size: number of data-parallel ranks served here.
    :param max_loras: LoRA adapters that the engine can serve in one batch; None if it serves none.
    :param lora_adapters: names of the LoRA adapters that are loaded already; each is registered as its own model.
    :param bootstrap: host and port of the disaggregation bootstrap server.
    :param runtime_config: further attributes of ``dynamo.llm.ModelRuntimeConfig``, such as
        ``kv_event_publishing_enabled``.
    :param runtime_data: engine-specific values published with the model.
    :param endpoints: further endpoints beside the one that serves ``generate``.
    """

    model_name: str
    model_path: str | None
    model_aliases: Sequence[str] = ()
    endpoint_types: Sequence[str] = ("chat", "completions")
    worker_type: str = "aggregated"
    needs: Sequence[Sequence[str]] = ()
    context_length: int | None = None
    vocab_size: int | None = None
    kv_block_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    data_parallel_start_rank: int = 0
    data_parallel_size: int = 1
    max_loras: int | None = None
    lora_adapters: Sequence[str] = ()
    bootstrap: tuple[str, int] | None = None
    runtime_config: Mapping[str, Any] = field(default_factory=dict)
    runtime_data: Mapping[str, Any] = field(default_factory=dict)
    endpoints: Sequence[EndpointSpec] = ()


class Engine(Protocol):
    """An inference engine, as the core drives it. Everything runs on the worker's one event loop."""

    async def start(self, worker_id: int) -> EngineInfo:
        """Start the engine and return what it serves.

        May block the event loop (many engines must be built in the main thread): the supervisor ends a start that
        was asked to stop.

        :param worker_id: the Dynamo instance id of this worker, unique in the cluster.
        :raises StartError: the engine cannot start here; the message goes to the operator.
        """

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Return the response to one request as an asynchronous iterator of chunks.

        The core cancels the task that iterates when the client goes away or the request is handed off.

        :raises InvalidRequestError: the request is wrong (HTTP 400).
        :raises EngineDeadError: the engine is beyond repair: ends the worker, the request migrates.
        """

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request inside the engine. An unknown id is no error."""

    def processes(self) -> Iterable[int]:
        """Return the pids of all processes without which the engine cannot serve; their death is fatal."""


@runtime_checkable
class PushesChunks(Protocol):
    """An engine that hands chunks over where they arise, without waking a task of each request for each of them."""

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Answer one request: call ``send`` for every chunk, and return after the last one.

        Everything said of :meth:`Engine.generate` holds. ``send`` never blocks; a chunk must not be changed once it is
        sent. What ``send`` raises must end this request only. An engine that makes more than its client reads is not
        held back, but its request is cancelled in the end; one that yields its chunks waits instead.
        """


@runtime_checkable
class HasCanary(Protocol):
    """An engine that can say what its cheapest real request is."""

    def canary_request(self) -> Request:
        """Return a request that makes the engine produce one token."""


@runtime_checkable
class ReportsProgress(Protocol):
    """An engine that can tell that it works although no token comes out (a long prefill, for one)."""

    def progress(self) -> int:
        """Return a number that grows with every engine step."""


@runtime_checkable
class MayPause(Protocol):
    """An engine that an operator can take out of service for a while: pauses, sleep, loading other weights."""

    def paused(self) -> bool:
        """Return whether it does not serve on purpose: then neither silence nor a late health check is a failure."""


@runtime_checkable
class HasMetrics(Protocol):
    """An engine with Prometheus metrics of its own."""

    def metrics_registry(self) -> CollectorRegistry:
        """Return the registry whose metrics are added to the worker's ``/metrics``."""


@runtime_checkable
class HasControlRoutes(Protocol):
    """An engine with control operations (sleep, profile, cache reset …) under ``/engine/NAME``.

    Whoever may call them names no path that has not passed through :attr:`EngineContext.allowed_paths`.
    """

    def control_routes(self) -> Mapping[str, Operation]:
        """Return the operations by route name."""


@runtime_checkable
class PublishesEvents(Protocol):
    """An engine that publishes KV events or load through the Dynamo runtime."""

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Start publishing for this endpoint; called before the model is registered.

        :param info: what is going to be registered: the engine's own information, and what the worker's flags add.
        """
