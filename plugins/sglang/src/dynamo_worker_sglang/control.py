"""Operations on SGLang while it serves: caches, memory, pauses, weights, profiles, adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct

from dynamo_worker import InvalidRequestError, operations
from dynamo_worker.adapters import Adapters
from dynamo_worker.logs import get_logger
from dynamo_worker.operations import Operation, Presence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo.runtime import Endpoint

    from dynamo_worker import EndpointSpec, EngineInfo
    from dynamo_worker.adapters import Adapter
    from dynamo_worker_sglang.manager import Manager

log = get_logger(__name__)

#: What ``release_memory_occupation`` can release.
_REGIONS = ("weights", "kv_cache", "cuda_graph")


class LoraLoader:
    """Loads adapters into SGLang."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def load(self, adapter: Adapter) -> None:
        """Read the weights."""
        _succeeded(
            await self._manager.load_lora_adapter(
                io_struct.LoadLoRAAdapterReqInput(lora_name=adapter.name, lora_path=adapter.path)
            )
        )

    async def unload(self, adapter: Adapter) -> None:
        """Forget the weights."""
        _succeeded(await self._manager.unload_lora_adapter(io_struct.UnloadLoRAAdapterReqInput(lora_name=adapter.name)))


def _succeeded(result: Any) -> None:
    if not result.success:
        raise RuntimeError(result.error_message)


class Control:
    """All operations of one engine.

    :ivar adapters: the LoRA adapters; None without ``--enable-lora``.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._presence = Presence()
        self._released: set[str] = set()
        self._paused = False
        self.adapters = (
            Adapters(LoraLoader(manager), {name: ref.lora_path for name, ref in manager.lora_ref_cache.items()})
            if manager.enable_lora
            else None
        )

    def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Remember the endpoint that leaves discovery while the engine cannot serve."""
        self._presence.attach(endpoint)
        if self.adapters is not None:
            self.adapters.attach(endpoint, info)

    def routes(self) -> Mapping[str, Operation]:
        """Return all operations by name."""
        own = {
            "flush_cache": self.flush_cache,
            "release_memory_occupation": self.release_memory_occupation,
            "resume_memory_occupation": self.resume_memory_occupation,
            "pause_generation": self.pause_generation,
            "continue_generation": self.continue_generation,
            "update_weights_from_disk": self.update_weights_from_disk,
            "start_profile": self.start_profile,
            "stop_profile": self.stop_profile,
        }
        return operations.routes({**own, **(self.adapters.operations() if self.adapters is not None else {})})

    def endpoints(self) -> list[EndpointSpec]:
        """Return the operations that Dynamo's own tools reach as endpoints."""
        adapters = self.adapters.endpoints() if self.adapters is not None else []
        return [operations.endpoint("clear_kv_blocks", self.flush_cache), *adapters]

    async def flush_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        """Forget all cached prefixes; waits ``timeout_s`` seconds for requests that use them."""
        result = await self._manager.flush_cache(body.get("timeout_s"))
        if not result.success:
            raise RuntimeError(result.message or "the cache is in use; it is not flushed")
        return {"message": "cache flushed"}

    async def release_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, end what is in flight, and release the accelerator's memory, or some ``tags`` of it."""
        tags = _tags(body)
        if self._released:
            return {"message": "the memory is released already"}

        async def release() -> None:
            if not self._paused:
                await self._pause(body)
            await self._manager.release_memory_occupation(io_struct.ReleaseMemoryOccupationReqInput(tags=tags))

        if self._paused:
            await release()
        else:
            await self._presence.step_out(release)
        self._released = set(tags or _REGIONS)
        log.info("Memory released", tags=",".join(sorted(self._released)))
        return {"message": "memory released"}

    async def resume_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the memory back, and enter discovery again when all of it is."""
        tags = _tags(body)
        if not self._released:
            return {"message": "the memory is not released"}

        async def resume() -> bool:
            await self._manager.resume_memory_occupation(io_struct.ResumeMemoryOccupationReqInput(tags=tags))
            self._released -= set(tags or _REGIONS)
            if not self._released and not self._paused:
                await self._continue({})
            return not self._released

        if self._paused:
            await resume()
        else:
            await self._presence.step_in(resume)
        if self._released:
            return {"message": f"partly resumed; still released: {sorted(self._released)}"}
        log.info("Memory resumed")
        return {"message": "memory resumed"}

    async def pause_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery and stop generating; ``mode``: ``abort`` (default), ``in_place`` or ``retract``."""
        if self._released:
            return {"message": "the memory is released: nothing is generated"}
        if not await self._presence.step_out(lambda: self._pause(body)):
            return {"message": "the engine is paused already"}
        self._paused = True
        log.info("Generation paused")
        return {"message": "generation paused"}

    async def continue_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Go on generating and enter discovery again."""
        if not self._paused:
            return {"message": "the engine is not paused"}
        if self._released:
            raise InvalidRequestError("the memory is released: resume_memory_occupation comes first")

        async def go_on() -> bool:
            await self._continue(body)
            return True

        await self._presence.step_in(go_on)
        self._paused = False
        log.info("Generation continues")
        return {"message": "generation continues"}

    async def _pause(self, body: dict[str, Any]) -> None:
        mode = body.get("mode", "abort")
        if mode not in ("abort", "in_place", "retract"):
            raise InvalidRequestError(f"mode: abort, in_place or retract is needed, not {mode!r:.80}")
        await self._manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode))

    async def _continue(self, body: dict[str, Any]) -> None:
        request = io_struct.ContinueGenerationReqInput(torch_empty_cache=bool(body.get("torch_empty_cache", True)))
        await self._manager.continue_generation(request)

    async def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        """Load other weights of the same model from ``model_path``, after what is in flight has ended."""
        known = {"model_path", "load_format", "abort_all_requests", "weight_version", "flush_cache"}
        unknown = sorted(body.keys() - known)
        if unknown or not isinstance(body.get("model_path"), str):
            raise InvalidRequestError(f"needed: model_path; possible: {', '.join(sorted(known))}")
        success, message, *_ = await self._manager.update_weights_from_disk(
            io_struct.UpdateWeightFromDiskReqInput(**body)
        )
        if not success:
            raise RuntimeError(message)
        log.info("Weights updated", path=body["model_path"])
        return {"message": message}

    async def start_profile(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start SGLang's profiler; ``output_dir``, ``num_steps``, ``activities`` and so on as in SGLang."""
        try:
            request = io_struct.ProfileReq(**body)
        except TypeError as error:
            raise InvalidRequestError(str(error)) from error
        await self._manager.start_profile(request)
        return {"message": "profiling"}

    async def stop_profile(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - every operation has a body
        """Stop SGLang's profiler and write what it saw."""
        await self._manager.stop_profile()
        return {"message": "stopped profiling"}


def _tags(body: dict[str, Any]) -> list[str] | None:
    tags = body.get("tags")
    if tags is not None and not (isinstance(tags, list) and tags and set(tags) <= set(_REGIONS)):
        raise InvalidRequestError(f"tags: a list of {', '.join(_REGIONS)} is needed, not {tags!r:.80}")
    return tags
