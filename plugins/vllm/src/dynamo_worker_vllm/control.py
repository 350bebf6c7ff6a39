"""Operations on vLLM while it serves: sleep, profiles, caches, LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from dynamo_worker.kit.engine_control import EngineControl, profile_routes
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker import EngineContext
    from dynamo_worker.kit.lora import LoraAdapter

log = get_logger(__name__)

#: The reason for which a sleeping engine is out of discovery.
_ASLEEP = "asleep"


class LoraLoader:
    """Loads LoRA adapters into vLLM."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def load(self, adapter: LoraAdapter) -> None:
        """Load the weights."""
        await self._llm.add_lora(lora_request(adapter))

    async def unload(self, adapter: LoraAdapter) -> None:
        """Free the weights."""
        await self._llm.remove_lora(adapter.number)


def lora_request(adapter: LoraAdapter) -> LoRARequest:
    """Return vLLM's description of an adapter, which accompanies each request for it."""
    return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=adapter.path)


class Control(EngineControl):
    """All operations of one engine."""

    def __init__(self, llm: AsyncLLM, context: EngineContext, model_names: Collection[str]) -> None:
        self._llm = llm
        super().__init__(
            context,
            routes={
                "sleep": self.sleep,
                "wake_up": self.wake_up,
                "reset_prefix_cache": self.reset_prefix_cache,
                **profile_routes(self._start_profile, llm.stop_profile),
            },
            endpoints={"clear_kv_blocks": self.reset_prefix_cache},
            lora=None if llm.vllm_config.lora_config is None else LoraAdapters(LoraLoader(llm), context, model_names),
        )

    async def sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and release the accelerator's memory."""
        level, mode = body.get("level", 1), body.get("mode", "wait")
        if not await self.gate.withdraw(lambda: self._llm.sleep(level=level, mode=mode), _ASLEEP):
            return {"message": "the engine is already asleep"}
        log.info("Engine sleeps", level=level)
        return {"message": f"the engine is asleep (level {level})"}

    async def wake_up(self, body: dict[str, Any]) -> dict[str, Any]:
        """Allocate the released memory again and rejoin discovery."""
        if not self.gate.reasons:
            return {"message": "the engine is awake"}
        tags = body.get("tags")

        async def resume() -> bool:
            await self._llm.wake_up(tags)
            return not await self._llm.is_sleeping()

        if not await self.gate.rejoin(resume, _ASLEEP):
            return {"message": f"partly awake: {tags}"}
        log.info("Engine woke up")
        return {"message": "the engine woke up"}

    async def _start_profile(self, body: dict[str, Any]) -> None:
        """Start vLLM's profiler, which writes where vLLM's flags say, into files that begin with ``profile_prefix``."""
        prefix = body.get("profile_prefix")
        await self._llm.start_profile(None if prefix is None else self.allowed_paths.name(prefix))

    async def reset_prefix_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop all cached prefixes."""
        if not await self._llm.reset_prefix_cache(
            reset_running_requests=bool(body.get("reset_running_requests")), reset_connector=True
        ):
            raise RuntimeError("the prefix cache was not reset: blocks are in use")
        return {"message": "prefix cache reset"}
