"""Operations on the engine while it runs: adapters, sleep, profiles, caches.

Each is a control route ``/engine/NAME`` of the worker's status server; those that Dynamo's own tools know are served
as endpoints of the same name too.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dynamo.llm import (
    LoRADownloader,
    ModelInput,
    ModelRuntimeConfig,
    WorkerType,
    lora_name_to_id,
    register_model,
    unregister_model,
)

from dynamo_worker import EndpointSpec, InvalidRequestError
from dynamo_worker.logs import get_logger
from dynamo_worker.runtime import model_type

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from dynamo.runtime import Endpoint
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker import EngineInfo

log = get_logger(__name__)

#: Seconds between two looks at whether an adapter is still in use.
_POLL_SECONDS = 0.05


@dataclass
class _Adapter:
    """A LoRA adapter that is served.

    :param request: what vLLM is told with every request for it.
    :param in_use: requests that run with it.
    """

    request: LoRARequest
    in_use: int = 0


class Adapters:
    """The LoRA adapters of this worker."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._lock = asyncio.Lock()
        self._endpoint: Endpoint | None = None
        self._info: EngineInfo | None = None
        self._loaded: dict[str, _Adapter] = {}

    @property
    def enabled(self) -> bool:
        """Whether vLLM was started with ``--enable-lora``."""
        return self._llm.vllm_config.lora_config is not None

    def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Remember where adapters are registered."""
        self._endpoint, self._info = endpoint, info

    def find(self, name: str | None) -> LoRARequest | None:
        """Return the adapter of this name, None for the model itself.

        :raises InvalidRequestError: there is neither.
        """
        if name is None or not self.enabled:
            return None
        adapter = self._loaded.get(name)
        if adapter is not None:
            return adapter.request
        info = self._info
        if info is None or name in (info.model_name, info.model_path, *info.model_aliases):
            return None
        raise InvalidRequestError(f"there is no model or LoRA adapter {name!r} on this worker")

    async def load(self, body: dict[str, Any]) -> dict[str, Any]:
        """Load ``lora_name`` from ``source.uri`` and register it as a model of its own."""
        from vllm.lora.request import LoRARequest

        name, uri = body.get("lora_name"), (body.get("source") or {}).get("uri")
        if not isinstance(name, str) or not name or not isinstance(uri, str) or not uri:
            raise InvalidRequestError('needed: {"lora_name": NAME, "source": {"uri": "file:///…" or "s3://…"}}')
        if not self.enabled:
            raise InvalidRequestError("vLLM runs without --enable-lora")
        async with self._lock:
            adapter = self._loaded.get(name)
            if adapter is not None:
                return {
                    "message": f"{name} is loaded already",
                    "lora_name": name,
                    "lora_id": adapter.request.lora_int_id,
                }
            path = await self._fetch(uri)
            request = LoRARequest(lora_name=name, lora_int_id=lora_name_to_id(name), lora_path=path)
            await self._llm.add_lora(request)
            self._loaded[name] = _Adapter(request)
            try:
                await self._register(name)
            except Exception:
                del self._loaded[name]
                await self._llm.remove_lora(request.lora_int_id)
                raise
        log.info("LoRA adapter loaded", name=name, path=path)
        return {"message": f"{name} loaded", "lora_name": name, "lora_id": request.lora_int_id}

    async def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take ``lora_name`` out of discovery, wait for its requests, and unload it."""
        name = body.get("lora_name")
        async with self._lock:
            adapter = self._loaded.get(name) if isinstance(name, str) else None
            if adapter is None or not isinstance(name, str):
                raise InvalidRequestError(f"there is no LoRA adapter {name!r}; loaded: {sorted(self._loaded)}")
            if self._endpoint is not None:
                await unregister_model(endpoint=self._endpoint, lora_name=name)
            while adapter.in_use:
                await asyncio.sleep(_POLL_SECONDS)
            del self._loaded[name]
            await self._llm.remove_lora(adapter.request.lora_int_id)
        log.info("LoRA adapter unloaded", name=name)
        return {"message": f"{name} unloaded", "lora_name": name, "lora_id": adapter.request.lora_int_id}

    async def list(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - every operation has a body
        """Return the loaded adapters and their ids."""
        loras = {name: adapter.request.lora_int_id for name, adapter in self._loaded.items()}
        return {"loras": loras, "count": len(loras)}

    def begin(self, name: str | None) -> LoRARequest | None:
        """Return the adapter for a request, and keep it from being unloaded until :meth:`end`.

        :raises InvalidRequestError: there is neither a model nor an adapter of this name.
        """
        request = self.find(name)
        if request is not None:
            self._loaded[request.lora_name].in_use += 1
        return request

    def end(self, request: LoRARequest | None) -> None:
        """Release an adapter."""
        if request is not None and request.lora_name in self._loaded:
            self._loaded[request.lora_name].in_use -= 1

    async def _register(self, name: str) -> None:
        if self._endpoint is None or self._info is None:
            return
        info = self._info
        config = ModelRuntimeConfig()
        config.context_length = info.context_length
        config.data_parallel_start_rank = info.data_parallel_start_rank
        config.data_parallel_size = info.data_parallel_size
        for key, value in info.runtime_config.items():
            setattr(config, key, value)
        await register_model(
            ModelInput.Tokens,
            model_type(info.endpoint_types),
            self._endpoint,
            info.model_path or "",
            name,
            worker_type=_worker_type(info.worker_type),
            needs=[[_worker_type(name) for name in peers] for peers in info.needs] or None,
            runtime_config=config,
            kv_cache_block_size=info.kv_block_size,
            lora_name=name,
            base_model_path=info.model_path,
            max_gpu_lora_count=self._llm.vllm_config.lora_config.max_loras,
        )

    @staticmethod
    async def _fetch(uri: str) -> str:
        parts = urlsplit(uri)
        if parts.scheme in ("", "file"):
            path = Path(unquote(parts.path))
            if not (path / "adapter_config.json").is_file():
                raise InvalidRequestError(f"{path} is no LoRA adapter: it has no adapter_config.json")
            return str(path)
        return str(await LoRADownloader().download_if_needed(uri))


class Control:
    """All operations of one engine."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._endpoint: Endpoint | None = None
        self._asleep = False
        self._lock = asyncio.Lock()
        self.adapters = Adapters(llm)

    def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Remember the endpoint that leaves discovery while the engine sleeps."""
        self._endpoint = endpoint
        self.adapters.attach(endpoint, info)

    def routes(self) -> Mapping[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
        """Return all operations by name."""
        operations = {
            "sleep": self.sleep,
            "wake_up": self.wake_up,
            "start_profile": self.start_profile,
            "stop_profile": self.stop_profile,
            "reset_prefix_cache": self.reset_prefix_cache,
        }
        if self.adapters.enabled:
            operations |= {
                "load_lora": self.adapters.load,
                "unload_lora": self.adapters.unload,
                "list_loras": self.adapters.list,
            }
        return {name: _answering(operation) for name, operation in operations.items()}

    def endpoints(self) -> list[EndpointSpec]:
        """Return the operations that Dynamo's own tools reach as endpoints."""
        routes = self.routes()
        names = {"clear_kv_blocks": "reset_prefix_cache"}
        names |= {name: name for name in ("load_lora", "unload_lora", "list_loras") if name in routes}
        return [
            EndpointSpec(name, generate=_streaming(routes[route]), takes_tokens=False) for name, route in names.items()
        ]

    async def sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish what is in flight, and release the accelerator's memory."""
        level, mode = body.get("level", 1), body.get("mode", "wait")
        async with self._lock:
            if self._asleep:
                return {"message": "the engine sleeps already"}
            if self._endpoint is not None:
                await self._endpoint.unregister_endpoint_instance()
            try:
                await self._llm.sleep(level=level, mode=mode)
            except BaseException:
                if self._endpoint is not None:
                    await self._endpoint.register_endpoint_instance()
                raise
            self._asleep = True
        log.info("Engine sleeps", level=level)
        return {"message": f"the engine sleeps (level {level})"}

    async def wake_up(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the memory back and enter discovery again."""
        async with self._lock:
            if not self._asleep:
                return {"message": "the engine is awake"}
            tags = body.get("tags")
            await self._llm.wake_up(tags)
            if await self._llm.is_sleeping():
                return {"message": f"partly awake: {tags}"}
            if self._endpoint is not None:
                await self._endpoint.register_endpoint_instance()
            self._asleep = False
        log.info("Engine woke up")
        return {"message": "the engine woke up"}

    async def start_profile(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start vLLM's profiler."""
        await self._llm.start_profile(body.get("profile_prefix"))
        return {"message": "profiling"}

    async def stop_profile(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - every operation has a body
        """Stop vLLM's profiler and write what it saw."""
        await self._llm.stop_profile()
        return {"message": "stopped profiling"}

    async def reset_prefix_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        """Forget all cached prefixes."""
        if not await self._llm.reset_prefix_cache(
            reset_running_requests=bool(body.get("reset_running_requests")), reset_connector=True
        ):
            raise RuntimeError("blocks are in use; the prefix cache is not reset")
        return {"message": "prefix cache reset"}


def _worker_type(name: str) -> WorkerType:
    worker_type: WorkerType = getattr(WorkerType, name.capitalize())
    return worker_type


def _answering(
    operation: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
    """Return an operation whose errors are answers."""

    async def answer(body: Any) -> dict[str, Any]:
        if body is not None and not isinstance(body, dict):
            return {"status": "error", "message": "the body must be a JSON object"}
        try:
            return {"status": "success", **await operation(body or {})}
        except Exception as error:
            log.warning("Control operation failed", operation=operation.__name__, error=error)
            return {"status": "error", "message": str(error) or type(error).__name__}

    return answer


def _streaming(operation: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> Any:
    """Return an operation in the shape of an endpoint's function."""

    async def generate(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:  # noqa: ARG001
        yield await operation(request)

    return generate
