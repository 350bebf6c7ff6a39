"""Operations on SGLang while it serves: caches, memory, pauses, weights, profiles, LoRA adapters."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, ClassVar

from sglang.srt.managers import io_struct

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.engine_control import MemoryControl, profile_routes
from dynamo_worker.kit.fields import refusal
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from dynamo_worker import EngineContext
    from dynamo_worker.kit.lora import LoraAdapter
    from dynamo_worker_sglang.manager import Manager

log = get_logger(__name__)

#: What ``pause_generation`` can do with requests in flight: end them, freeze them, or put them back in the queue.
_MODES = ("abort", "in_place", "retract")
#: Longest wait for a cache that is in use, in seconds.
_LONGEST_FLUSH = 600
#: SGLang's default directory for profiles.
_PROFILES = "/tmp"  # noqa: S108 - only if it is an allowed root


class LoraLoader:
    """Loads LoRA adapters into SGLang."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def load(self, adapter: LoraAdapter) -> None:
        """Load the weights."""
        request = io_struct.LoadLoRAAdapterReqInput(lora_name=adapter.name, lora_path=adapter.path)
        _check(await self._manager.load_lora_adapter(request))

    async def unload(self, adapter: LoraAdapter) -> None:
        """Free the weights."""
        _check(await self._manager.unload_lora_adapter(io_struct.UnloadLoRAAdapterReqInput(lora_name=adapter.name)))


def _check(result: Any) -> None:
    if not result.success:
        raise RuntimeError(result.error_message)


class Control(MemoryControl):
    """All operations of one engine. The mode of a pause is a reason for being out of discovery, too."""

    REGIONS: ClassVar = ("weights", "kv_cache", "cuda_graph")

    def __init__(self, manager: Manager, context: EngineContext, model_names: Collection[str]) -> None:
        self._manager = manager
        loaded = {name: ref.lora_path for name, ref in manager.lora_ref_cache.items()}
        super().__init__(
            context,
            routes={
                "flush_cache": self.flush_cache,
                "pause_generation": self.pause_generation,
                "continue_generation": self.continue_generation,
                "update_weights_from_disk": self.update_weights_from_disk,
                **profile_routes(self._start_profile, manager.stop_profile),
            },
            endpoints={"clear_kv_blocks": self.flush_cache},
            lora=LoraAdapters(LoraLoader(manager), context, model_names, loaded) if manager.enable_lora else None,
        )

    async def flush_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop all cached prefixes, waiting ``timeout_s`` seconds for requests that use them."""
        timeout = body.get("timeout_s")
        if timeout is not None and not (type(timeout) in (int, float) and 0 <= timeout <= _LONGEST_FLUSH):
            raise refusal("timeout_s", f"a number from 0 to {_LONGEST_FLUSH}", timeout)
        result = await self._manager.flush_cache(timeout)
        if not result.success:
            raise RuntimeError(result.message or "the cache was not flushed: it is in use")
        return {"message": "cache flushed"}

    async def release_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Release memory; ``mode`` says what becomes of the requests in flight, as for ``pause_generation``."""
        _mode(body)
        return await super().release_memory_occupation(body)

    async def release_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        """Pause generation, and release regions of the accelerator's memory."""
        mode = _mode(body)
        if "in_place" in (mode, *self.gate.reasons):
            raise InvalidRequestError("requests paused in place may still use the memory")
        await self._pause(mode)
        try:
            await self._manager.release_memory_occupation(io_struct.ReleaseMemoryOccupationReqInput(tags=tags))
        except BaseException:
            await self._continue(body, ())
            raise

    async def resume_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        """Allocate regions of memory again, and continue generation unless there is another reason not to."""
        await self._manager.resume_memory_occupation(io_struct.ResumeMemoryOccupationReqInput(tags=tags))
        await self._continue(body, tags)

    async def pause_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery and pause generation; ``mode`` is ``abort`` (default), ``in_place`` or ``retract``."""
        mode = _mode(body)
        if self.gate.reasons.intersection(_MODES):
            return {"message": "the engine is already paused"}
        await self.gate.withdraw(lambda: self._pause(mode), mode)
        log.info("Generation paused")
        return {"message": "generation paused"}

    async def continue_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Continue generation and rejoin discovery, unless memory is released."""
        if not self.gate.reasons.intersection(_MODES):
            return {"message": "the engine is not paused"}
        if not await self.gate.rejoin(lambda: self._continue(body, _MODES), *_MODES):
            return {"message": f"generation continues when memory is resumed: {sorted(self.gate.reasons)}"}
        log.info("Generation continues")
        return {"message": "generation continues"}

    async def _pause(self, mode: str) -> None:
        """Pause generation unless it is paused."""
        if not self.gate.reasons:
            await self._manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode))

    async def _continue(self, body: dict[str, Any], gone: Iterable[str]) -> bool:
        """Continue generation unless another reason is left."""
        if self.gate.reasons.issubset(gone):
            request = io_struct.ContinueGenerationReqInput(torch_empty_cache=bool(body.get("torch_empty_cache", True)))
            await self._manager.continue_generation(request)
        return True

    async def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and load new weights from ``model_path``."""
        known = {"model_path", "load_format", "abort_all_requests", "weight_version", "flush_cache"}
        unknown = sorted(body.keys() - known)
        if unknown or not isinstance(body.get("model_path"), str):
            raise InvalidRequestError(f"expected model_path and optionally {', '.join(sorted(known - {'model_path'}))}")
        path = await asyncio.to_thread(self.allowed_paths.to_load, body["model_path"])
        request = io_struct.UpdateWeightFromDiskReqInput(**{**body, "model_path": path})
        success, message, *_ = await self.gate.withdrawn_for(lambda: self._manager.update_weights_from_disk(request))
        if not success:
            raise RuntimeError(message)
        log.info("Weights updated", path=path)
        return {"message": message}

    async def _start_profile(self, body: dict[str, Any]) -> None:
        """Start SGLang's profiler with ``output_dir``, ``num_steps``, ``activities`` and so on as in SGLang."""
        directory = body.get("output_dir") or os.environ.get("SGLANG_TORCH_PROFILER_DIR", _PROFILES)
        directory = await self.output_directory(directory)
        for name in ("profile_id", "profile_prefix"):
            if body.get(name) is not None:
                self.allowed_paths.name(body[name])
        try:
            request = io_struct.ProfileReq(**{**body, "output_dir": directory})
        except TypeError as error:
            raise InvalidRequestError(str(error)) from error
        await self._manager.start_profile(request)


def _mode(body: dict[str, Any]) -> str:
    """Return what to do with the requests in flight."""
    mode: str = body.get("mode", _MODES[0])
    if mode not in _MODES:
        raise refusal("mode", f"one of {', '.join(_MODES)}", mode)
    return mode
