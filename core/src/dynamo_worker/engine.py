"""The engine protocol: what an engine plugin provides. The worker calls it directly, never through the hooks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.requests import Request as Request
from dynamo_worker.responses import Chunk as Chunk

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo.runtime import Endpoint
    from prometheus_client import CollectorRegistry

    from dynamo_worker.embeddings import EmbeddingSpec


class RequestContext(Protocol):
    """The part of ``dynamo.runtime.Context`` that engines use."""

    def id(self) -> str:
        """Return the request id, unique in the cluster."""

    def is_stopped(self) -> bool:
        """Return whether the client is gone or the request was cancelled."""

    def trace_headers(self) -> dict[str, str] | None:
        """Return the W3C trace headers of the request, or None if it is not traced."""


class LocalContext:
    """The context of a request made inside the worker: a warm-up, a canary, a test."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def id(self) -> str:
        """Return the request id."""
        return self._request_id

    def is_stopped(self) -> bool:
        """Return False: such a request is stopped by cancelling its task."""
        return False

    def trace_headers(self) -> dict[str, str] | None:
        """Return None: the request is not traced."""
        return None


class Discovery(Protocol):
    """The worker's entries in Dynamo's discovery, for an engine that changes them while it serves.

    An engine must change its entries through this object only: the worker restores entries that disappear otherwise.
    Each call may raise whatever the Dynamo runtime raises. Before the model is registered, and once the worker is
    stopping, the calls do nothing.
    """

    async def withdraw(self) -> None:
        """Withdraw the worker's endpoint from discovery: routers send no new requests."""

    async def rejoin(self) -> None:
        """Register the endpoint again."""

    async def register_adapter(self, name: str) -> None:
        """Register a LoRA adapter as a separate model."""

    async def unregister_adapter(self, name: str) -> None:
        """Remove the model of a LoRA adapter from discovery."""


class Undiscovered:
    """Stands in for :class:`Discovery` where an engine runs without a cluster."""

    async def withdraw(self) -> None:
        """Do nothing."""

    async def rejoin(self) -> None:
        """Do nothing."""

    async def register_adapter(self, name: str) -> None:
        """Do nothing."""

    async def unregister_adapter(self, name: str) -> None:
        """Do nothing."""


#: A control operation: takes the JSON object of a request and returns the JSON object of the answer. If it raises, the
#: caller gets the exception's message.
Operation = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class LargeOperation:
    """A control operation that takes larger bodies than 64 KiB. Decoding one keeps the event loop busy.

    :param operation: what it does.
    :param most_body_bytes: size of the largest body.
    """

    operation: Operation
    most_body_bytes: int

    def __call__(self, body: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        """Run the operation."""
        return self.operation(body)


#: Answers one request with a stream of chunks.
Generate = Callable[[Request, RequestContext], AsyncIterator[Chunk]]

#: Sends one chunk to the client. Call it on the event loop; it never blocks. The chunk must not be modified afterwards.
#: Raises if an earlier chunk failed: RuntimeError if the client is gone or does not read, ValueError if the chunk could
#: not be encoded.
Send = Callable[[Chunk], None]

#: Answers one request by calling ``send``.
Push = Callable[[Request, RequestContext, Send], Awaitable[None]]


@dataclass(frozen=True)
class EngineContext:
    """An engine's surroundings: what the worker passes to ``create_engine``.

    :param component: Dynamo path of the worker, ``namespace.component``.
    :param private_dir: a directory for sockets and temporary files, removed with the worker.
    :param supervised: whether a supervisor process cleans up after this one.
    :param allowed_paths: the directories that control operations may read and write: check every path that a request
        names with it.
    :param events_wanted: whether a router may read KV events and load. If not, publish none: every publisher opens a
        port.
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
    :param generate: the function that answers its requests; None for the engine's ``generate``.
    :param graceful_shutdown: whether requests in flight may finish during the drain. If not, they end with a migratable
        error as soon as the drain starts.
    :param metrics_labels: additional labels for the runtime's metrics of this endpoint.
    :param registers_model: whether the model is registered on this endpoint.
    :param takes_tokens: whether its requests are of the engine's kind, as ``EngineInfo.model_input`` and
        ``EngineInfo.embeddings`` say, which the worker then checks. Otherwise requests and chunks may be any JSON
        object.
    """

    name: str
    generate: Callable[[Any, RequestContext], AsyncIterator[Any]] | None = None
    graceful_shutdown: bool = True
    metrics_labels: Sequence[tuple[str, str]] = ()
    registers_model: bool = False
    takes_tokens: bool = True


@dataclass(frozen=True)
class EngineInfo:
    """What a started engine tells routers and frontends about itself. Leave unknown values None.

    :param model_name: the name that clients ask for.
    :param model_path: directory with ``config.json`` and the tokenizer, or a Hugging Face Hub name. With ``text`` any
        name will do, as frontends read no files. None registers no model (a headless rank of a multi-node engine).
    :param model_aliases: additional names of the model. With ``text``, requests have the name that the client uses, so
        these may be other models.
    :param endpoint_types: OpenAI APIs to serve: names of ``dynamo.llm.ModelType`` members in lower case.
    :param model_input: what requests and chunks contain: ``tokens``, or ``text`` for bodies and chunks of OpenAI's APIs
        (:mod:`dynamo_worker.text`), whose requests no frontend can continue on another worker. Names of
        ``dynamo.llm.ModelInput`` members in lower case.
    :param embeddings: of an engine that makes embeddings: its vectors (:mod:`dynamo_worker.embeddings`). Its only
        endpoint type is ``embedding``, and no frontend runs its requests on another worker. None for one that
        generates.
    :param worker_type: ``aggregated``, ``prefill``, ``decode`` or ``encode``.
    :param needs: peers without which this worker cannot serve: a list of alternatives, each a list of worker types.
    :param context_length: longest sequence in tokens, prompt and answer together.
    :param vocab_size: number of token ids, including added tokens and placeholders: the worker refuses prompts with
        this id or a higher one. None leaves the check to the engine.
    :param kv_block_size: tokens per KV-cache block.
    :param total_kv_blocks: KV-cache blocks per data-parallel rank.
    :param max_num_seqs: most sequences per batch.
    :param max_num_batched_tokens: most tokens per batch.
    :param data_parallel_start_rank: first data-parallel rank served here.
    :param data_parallel_size: number of data-parallel ranks served here.
    :param max_loras: most LoRA adapters per batch; None if the engine serves none.
    :param lora_adapters: names of the LoRA adapters already loaded; each is registered as a separate model.
    :param bootstrap: host and port of the disaggregation bootstrap server.
    :param runtime_config: additional attributes of ``dynamo.llm.ModelRuntimeConfig``, such as
        ``kv_event_publishing_enabled``.
    :param runtime_data: engine-specific values published with the model.
    :param endpoints: additional endpoints, beside the one that serves ``generate``.
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
    model_input: str = "tokens"
    embeddings: EmbeddingSpec | None = None


class Engine(Protocol):
    """An inference engine. All methods are called on the worker's event loop."""

    async def start(self, worker_id: int) -> EngineInfo:
        """Start the engine and return what it serves.

        May block the event loop, as many engines must be built in the main thread: the supervisor can still stop the
        worker.

        :param worker_id: the Dynamo instance id of this worker, unique in the cluster.
        :raises StartError: the engine cannot start here; the operator sees the message.
        """

    def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Answer one request with an asynchronous iterator of chunks.

        The worker cancels the iterating task when the client disconnects or the request is handed off, and calls
        :meth:`abort` afterwards.

        :raises InvalidRequestError: the request is invalid; its client gets HTTP 400 with the message.
        :raises EngineDeadError: the engine cannot recover: the worker ends and the request migrates.
        """

    async def abort(self, request_id: str) -> None:
        """Stop the engine's work for one request.

        Called after every request that ended early, for at most 10 seconds. The engine may have finished the request
        or never have seen it: an unknown id is not an error. Must be idempotent.
        """

    def processes(self) -> Iterable[int]:
        """Return the pids of all processes that the engine cannot serve without; the death of one is fatal."""


@runtime_checkable
class PushesChunks(Protocol):
    """An engine that sends chunks from wherever they are produced, without waking one task per request and chunk."""

    async def push(self, request: Request, context: RequestContext, send: Send) -> None:
        """Answer one request: call ``send`` for each chunk, and return after the last one.

        Takes the place of :meth:`Engine.generate` and follows the same rules. ``send`` never blocks; a chunk must not
        be modified after it is sent. An exception from ``send`` must end this request only. There is no backpressure: a
        request whose client reads too slowly is cancelled. ``generate`` waits for such a client instead.
        """


@runtime_checkable
class HasCanary(Protocol):
    """An engine that provides its cheapest real request, for the warm-up and for stall detection."""

    def canary_request(self) -> Request:
        """Return a new request that makes the engine produce one token."""


@runtime_checkable
class ReportsProgress(Protocol):
    """An engine that reports progress even while it produces no token, as during a long prefill."""

    def progress(self) -> int:
        """Return a number that grows with every step of the engine."""


@runtime_checkable
class MayPause(Protocol):
    """An engine that an operator can take out of service temporarily: pause, sleep, weight updates."""

    def paused(self) -> bool:
        """Return whether it is out of service on purpose: silence and late health checks are no failures then."""


@runtime_checkable
class HasMetrics(Protocol):
    """An engine with Prometheus metrics."""

    def metrics_registry(self) -> CollectorRegistry:
        """Return the registry with the engine's metrics, which the worker adds to its ``/metrics``.

        Its collectors are called in a thread, one scrape at a time. Each sample gets the worker's labels
        (``dynamo_component``, ``model`` …), except those that it has already.
        """


@runtime_checkable
class HasControlRoutes(Protocol):
    """An engine with control operations (sleep, profile, cache reset …) under ``/engine/NAME``.

    An operation must check each path that its caller names with :attr:`EngineContext.allowed_paths`.
    """

    def control_routes(self) -> Mapping[str, Operation]:
        """Return the operations by route name."""


@runtime_checkable
class PublishesEvents(Protocol):
    """An engine that publishes KV events or load through the Dynamo runtime."""

    async def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Start publishing for this endpoint; called before the model is registered.

        :param info: the information to be registered: the engine's own, completed by the worker's flags.
        """
