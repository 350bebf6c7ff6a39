"""Operations on vLLM while it serves: sleep, profiles, caches, adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from dynamo_worker import operations
from dynamo_worker.adapters import Adapters
from dynamo_worker.logs import get_logger
from dynamo_worker.operations import Operation, Presence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo.runtime import Endpoint
    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker import EndpointSpec, EngineInfo
    from dynamo_worker.adapters import Adapter

log = get_logger(__name__)


class LoraLoader:
    """Loads adapters into vLLM."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    @staticmethod
    def request(adapter: Adapter) -> LoRARequest:
        """Return what vLLM is told with every request for an adapter."""
        return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=adapter.path)

    async def load(self, adapter: Adapter) -> None:
        """Read the weights."""
        await self._llm.add_lora(self.request(adapter))

    async def unload(self, adapter: Adapter) -> None:
        """Forget the weights."""
        await self._llm.remove_lora(adapter.number)


class Control:
    """All operations of one engine.

    :ivar adapters: the LoRA adapters; None without ``--enable-lora``.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._presence = Presence()
        lora = llm.vllm_config.lora_config
        self.adapters = None if lora is None else Adapters(LoraLoader(llm))

    def attach(self, endpoint: Endpoint, info: EngineInfo) -> None:
        """Remember the endpoint that leaves discovery while the engine sleeps."""
        self._presence.attach(endpoint)
        if self.adapters is not None:
            self.adapters.attach(endpoint, info)

    def routes(self) -> Mapping[str, Operation]:
        """Return all operations by name."""
        own = {
            "sleep": self.sleep,
            "wake_up": self.wake_up,
            "start_profile": self.start_profile,
            "stop_profile": self.stop_profile,
            "reset_prefix_cache": self.reset_prefix_cache,
        }
        return operations.routes({**own, **(self.adapters.operations() if self.adapters is not None else {})})

    def endpoints(self) -> list[EndpointSpec]:
        """Return the operations that Dynamo's own tools reach as endpoints."""
        adapters = self.adapters.endpoints() if self.adapters is not None else []
        return [operations.endpoint("clear_kv_blocks", self.reset_prefix_cache), *adapters]

    async def sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish what is in flight, and release the accelerator's memory."""
        level, mode = body.get("level", 1), body.get("mode", "wait")
        if not await self._presence.step_out(lambda: self._llm.sleep(level=level, mode=mode)):
            return {"message": "the engine sleeps already"}
        log.info("Engine sleeps", level=level)
        return {"message": f"the engine sleeps (level {level})"}

    async def wake_up(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the memory back and enter discovery again."""
        if not self._presence.away:
            return {"message": "the engine is awake"}
        tags = body.get("tags")

        async def resume() -> bool:
            await self._llm.wake_up(tags)
            return not await self._llm.is_sleeping()

        if not await self._presence.step_in(resume):
            return {"message": f"partly awake: {tags}"}
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
