"""Operations on vLLM while it serves: sleep, profiles, caches, adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from dynamo_worker.kit.engine_control import EngineControl
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker import EngineContext
    from dynamo_worker.kit.lora import LoraAdapter

log = get_logger(__name__)

#: Why the engine is out of discovery.
_ASLEEP = "asleep"


class LoraLoader:
    """Loads adapters into vLLM."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    @staticmethod
    def request(adapter: LoraAdapter) -> LoRARequest:
        """Return what vLLM is told with every request for an adapter."""
        return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=adapter.path)

    async def load(self, adapter: LoraAdapter) -> None:
        """Read the weights."""
        await self._llm.add_lora(self.request(adapter))

    async def unload(self, adapter: LoraAdapter) -> None:
        """Forget the weights."""
        await self._llm.remove_lora(adapter.number)


class Control(EngineControl):
    """All operations of one engine."""

    def __init__(self, llm: AsyncLLM, context: EngineContext, model_names: Collection[str]) -> None:
        self._llm = llm
        self._allowed_paths = context.allowed_paths
        super().__init__(
            context,
            routes={
                "sleep": self.sleep,
                "wake_up": self.wake_up,
                "start_profile": self.start_profile,
                "stop_profile": self.stop_profile,
                "reset_prefix_cache": self.reset_prefix_cache,
            },
            endpoints={"clear_kv_blocks": self.reset_prefix_cache},
            lora=None if llm.vllm_config.lora_config is None else LoraAdapters(LoraLoader(llm), context, model_names),
        )

    async def sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish what is in flight, and release the accelerator's memory."""
        level, mode = body.get("level", 1), body.get("mode", "wait")
        if not await self.gate.withdraw(lambda: self._llm.sleep(level=level, mode=mode), _ASLEEP):
            return {"message": "the engine sleeps already"}
        log.info("Engine sleeps", level=level)
        return {"message": f"the engine sleeps (level {level})"}

    async def wake_up(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the memory back and enter discovery again."""
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

    async def start_profile(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start vLLM's profiler, which writes where its flags say; ``profile_prefix`` begins the files' names."""
        prefix = body.get("profile_prefix")
        await self._llm.start_profile(None if prefix is None else self._allowed_paths.name(prefix))
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
