"""Operations on SGLang while it serves: caches, memory, pauses, weights, profiles, adapters."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.engine_control import EngineControl
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from dynamo_worker import EngineContext
    from dynamo_worker.kit.lora import LoraAdapter
    from dynamo_worker_sglang.manager import Manager

log = get_logger(__name__)

#: What ``release_memory_occupation`` can release.
_REGIONS = ("weights", "kv_cache", "cuda_graph")
#: How ``pause_generation`` can treat requests in flight: end them, leave them as they are, or let them wait.
_MODES = ("abort", "in_place", "retract")
#: Most seconds to wait for a cache that is in use.
_LONGEST_FLUSH = 600
#: Where SGLang writes profiles unless it is told otherwise.
_PROFILES = "/tmp"  # noqa: S108 - only if it is an allowed root


class LoraLoader:
    """Loads adapters into SGLang."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def load(self, adapter: LoraAdapter) -> None:
        """Read the weights."""
        _succeeded(
            await self._manager.load_lora_adapter(
                io_struct.LoadLoRAAdapterReqInput(lora_name=adapter.name, lora_path=adapter.path)
            )
        )

    async def unload(self, adapter: LoraAdapter) -> None:
        """Forget the weights."""
        _succeeded(await self._manager.unload_lora_adapter(io_struct.UnloadLoRAAdapterReqInput(lora_name=adapter.name)))


def _succeeded(result: Any) -> None:
    if not result.success:
        raise RuntimeError(result.error_message)


class Control(EngineControl):
    """All operations of one engine.

    While it is out of discovery, the reasons are the regions of memory that are released, and the mode of a pause.
    """

    def __init__(self, manager: Manager, context: EngineContext, model_names: Collection[str]) -> None:
        self._manager = manager
        self._allowed_paths = context.allowed_paths
        loaded = {name: ref.lora_path for name, ref in manager.lora_ref_cache.items()}
        super().__init__(
            context,
            routes={
                "flush_cache": self.flush_cache,
                "release_memory_occupation": self.release_memory_occupation,
                "resume_memory_occupation": self.resume_memory_occupation,
                "pause_generation": self.pause_generation,
                "continue_generation": self.continue_generation,
                "update_weights_from_disk": self.update_weights_from_disk,
                "start_profile": self.start_profile,
                "stop_profile": self.stop_profile,
            },
            endpoints={"clear_kv_blocks": self.flush_cache},
            lora=LoraAdapters(LoraLoader(manager), context, model_names, loaded) if manager.enable_lora else None,
        )

    async def flush_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        """Forget all cached prefixes; waits ``timeout_s`` seconds for requests that use them."""
        timeout = body.get("timeout_s")
        if timeout is not None and not (type(timeout) in (int, float) and 0 <= timeout <= _LONGEST_FLUSH):
            raise InvalidRequestError(f"timeout_s must be a number from 0 to {_LONGEST_FLUSH}")
        result = await self._manager.flush_cache(timeout)
        if not result.success:
            raise RuntimeError(result.message or "the cache is in use; it is not flushed")
        return {"message": "cache flushed"}

    async def release_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, end what is in flight, and release the accelerator's memory, or some ``tags`` of it."""
        tags, mode = _tags(body), _mode(body)

        async def release() -> None:
            if "in_place" in (mode, *self.gate.reasons):
                raise InvalidRequestError("requests that are paused in place may use the memory")
            await self._pause(mode)
            new = [tag for tag in tags if tag not in self.gate.reasons]
            try:
                await self._manager.release_memory_occupation(io_struct.ReleaseMemoryOccupationReqInput(tags=new))
            except BaseException:
                await self._continue(body, ())
                raise

        if not await self.gate.withdraw(release, *tags):
            return {"message": "the memory is released already"}
        log.info("Memory released", tags=",".join(tags))
        return {"message": "memory released"}

    async def resume_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the memory back, and enter discovery again when all of it is."""
        tags = _tags(body)
        if not self.gate.reasons.intersection(tags):
            return {"message": "the memory is not released"}

        async def resume() -> bool:
            released = [tag for tag in tags if tag in self.gate.reasons]
            await self._manager.resume_memory_occupation(io_struct.ResumeMemoryOccupationReqInput(tags=released))
            return await self._continue(body, tags)

        await self.gate.rejoin(resume, *tags)
        released = sorted(self.gate.reasons.intersection(_REGIONS))
        if released:
            return {"message": f"partly resumed; still released: {released}"}
        log.info("Memory resumed")
        return {"message": "memory resumed"}

    async def pause_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery and stop generating; ``mode``: ``abort`` (default), ``in_place`` or ``retract``."""
        mode = _mode(body)
        if self.gate.reasons.intersection(_MODES):
            return {"message": "the engine is paused already"}
        await self.gate.withdraw(lambda: self._pause(mode), mode)
        log.info("Generation paused")
        return {"message": "generation paused"}

    async def continue_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Go on generating and enter discovery again, unless memory is released."""
        if not self.gate.reasons.intersection(_MODES):
            return {"message": "the engine is not paused"}
        if not await self.gate.rejoin(lambda: self._continue(body, _MODES), *_MODES):
            return {"message": f"generation continues when memory is resumed: {sorted(self.gate.reasons)}"}
        log.info("Generation continues")
        return {"message": "generation continues"}

    async def _pause(self, mode: str) -> None:
        """Stop generating unless that is so already."""
        if not self.gate.reasons:
            await self._manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode))

    async def _continue(self, body: dict[str, Any], gone: Iterable[str]) -> bool:
        """Go on generating if there is no other reason not to."""
        if self.gate.reasons.issubset(gone):
            request = io_struct.ContinueGenerationReqInput(torch_empty_cache=bool(body.get("torch_empty_cache", True)))
            await self._manager.continue_generation(request)
        return True

    async def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, and load other weights of the same model from ``model_path`` after what is in flight."""
        known = {"model_path", "load_format", "abort_all_requests", "weight_version", "flush_cache"}
        unknown = sorted(body.keys() - known)
        if unknown or not isinstance(body.get("model_path"), str):
            raise InvalidRequestError(f"needed: model_path; possible: {', '.join(sorted(known))}")
        path = await asyncio.to_thread(self._allowed_paths.to_load, body["model_path"])
        request = io_struct.UpdateWeightFromDiskReqInput(**{**body, "model_path": path})
        success, message, *_ = await self.gate.withdrawn_for(lambda: self._manager.update_weights_from_disk(request))
        if not success:
            raise RuntimeError(message)
        log.info("Weights updated", path=path)
        return {"message": message}

    async def start_profile(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start SGLang's profiler; ``output_dir``, ``num_steps``, ``activities`` and so on as in SGLang."""
        directory = body.get("output_dir") or os.environ.get("SGLANG_TORCH_PROFILER_DIR", _PROFILES)
        if not isinstance(directory, str):
            raise InvalidRequestError(f"output_dir: a directory is needed, not {directory!r:.80}")
        directory = await asyncio.to_thread(self._allowed_paths.to_write, directory)
        for name in ("profile_id", "profile_prefix"):
            if body.get(name) is not None:
                self._allowed_paths.name(body[name])
        try:
            request = io_struct.ProfileReq(**{**body, "output_dir": directory})
        except TypeError as error:
            raise InvalidRequestError(str(error)) from error
        await self._manager.start_profile(request)
        return {"message": "profiling"}

    async def stop_profile(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - every operation has a body
        """Stop SGLang's profiler and write what it saw."""
        await self._manager.stop_profile()
        return {"message": "stopped profiling"}


def _tags(body: dict[str, Any]) -> list[str]:
    """Return the regions of memory that are meant: all, unless some are named."""
    tags = body.get("tags", list(_REGIONS))
    if not (isinstance(tags, list) and tags and set(tags) <= set(_REGIONS)):
        raise InvalidRequestError(f"tags: a list of {', '.join(_REGIONS)} is needed, not {tags!r:.80}")
    return tags


def _mode(body: dict[str, Any]) -> str:
    """Return what becomes of requests in flight."""
    mode: str = body.get("mode", _MODES[0])
    if mode not in _MODES:
        raise InvalidRequestError(f"mode: one of {', '.join(_MODES)} is needed, not {mode!r:.80}")
    return mode
