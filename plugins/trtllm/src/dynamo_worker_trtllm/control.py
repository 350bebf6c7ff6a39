"""Operations on TensorRT-LLM while it serves: memory, prefix cache, profiles, LoRA adapters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from tensorrt_llm.executor.request import LoRARequest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.kit.engine_control import EngineControl, profile_routes, regions
from dynamo_worker.kit.fields import refusal
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection

    from dynamo_worker import EngineContext
    from dynamo_worker.kit.lora import LoraAdapter

log = get_logger(__name__)

#: The parts of memory that TensorRT-LLM can release.
_REGIONS: Final = ("kv_cache", "weights")
#: Longest wait for the ranks' answer to an operation, or for the requests in flight, in seconds.
_LIMIT_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.05


class LoraLoader:
    """Checks LoRA adapters: TensorRT-LLM loads one with its first request, and drops it when it needs the room."""

    async def load(self, adapter: LoraAdapter) -> None:
        """Check the adapter's files."""
        await asyncio.to_thread(lora_request, adapter)

    async def unload(self, adapter: LoraAdapter) -> None:
        """Do nothing: no more requests name the adapter, so others take its room."""


def lora_request(adapter: LoraAdapter) -> LoRARequest:
    """Return TensorRT-LLM's description of an adapter, which accompanies each request for it.

    :raises InvalidRequestError: the adapter's directory is gone.
    """
    try:
        return LoRARequest(adapter.name, adapter.number, adapter.path)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


class Control(EngineControl):
    """All operations of one engine. Its reasons for being out of discovery are the released parts of memory."""

    def __init__(
        self, llm: Any, context: EngineContext, model_names: Collection[str], requests: Collection[object]
    ) -> None:
        """Take the engine.

        :param requests: those in flight.
        """
        self._llm = llm
        self._requests = requests
        super().__init__(
            context,
            routes={
                "release_memory_occupation": self.release_memory_occupation,
                "resume_memory_occupation": self.resume_memory_occupation,
                "reset_prefix_cache": self.reset_prefix_cache,
                **profile_routes(self._start_profile, lambda: self._call("stop_profile")),
            },
            endpoints={"clear_kv_blocks": self.reset_prefix_cache},
            lora=LoraAdapters(LoraLoader(), context, model_names) if llm.args.enable_lora else None,
        )

    async def release_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and release the GPU's memory, or some ``tags`` of it."""
        tags = regions(body, _REGIONS)
        if getattr(self._llm.args, "sleep_config", None) is None:
            raise InvalidRequestError("the engine cannot release memory: start it with --sleep-config '{}'")

        async def release() -> None:
            await asyncio.wait_for(self._idle(), _LIMIT_SECONDS)
            await self._call("sleep", tags)

        if not await self.gate.withdraw(release, *tags):
            return {"message": "the memory is already released"}
        log.info("Memory released", tags=",".join(tags))
        return {"message": "memory released"}

    async def _idle(self) -> None:
        while self._requests:
            await asyncio.sleep(_POLL_SECONDS)

    async def resume_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Allocate the released memory, or some ``tags`` of it, again; rejoin discovery once none is released."""
        tags = [tag for tag in regions(body, _REGIONS) if tag in self.gate.reasons]
        if not tags:
            return {"message": "the memory is not released"}

        async def resume() -> bool:
            await self._call("wakeup", tags)
            return True

        if not await self.gate.rejoin(resume, *tags):
            return {"message": f"partly resumed; still released: {sorted(self.gate.reasons)}"}
        log.info("Memory resumed")
        return {"message": "memory resumed"}

    async def reset_prefix_cache(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - it has no parameters
        """Drop all cached prefixes."""
        reset = getattr(self._llm, "reset_prefix_cache", None)
        await (self._call("reset_prefix_cache") if reset is None else _in_thread(reset))
        return {"message": "prefix cache reset"}

    async def _start_profile(self, body: dict[str, Any]) -> None:
        """Start the profiler of every rank, which writes into ``output_dir``."""
        directory = body.get("output_dir")
        if not isinstance(directory, str):
            raise refusal("output_dir", "a directory", directory)
        await self._call("start_profile", await asyncio.to_thread(self.allowed_paths.to_write, directory))

    async def _call(self, method: str, *arguments: Any) -> None:
        """Call a method of every rank, off the event loop: it waits for the answers.

        :raises InvalidRequestError: this version of TensorRT-LLM cannot do that.
        """
        call = getattr(self._llm, "_collective_rpc", None)
        if call is None:
            raise InvalidRequestError(f"this version of TensorRT-LLM has no {method}")
        try:
            await _in_thread(call, method, arguments, {}, False)
        except (AttributeError, NotImplementedError) as error:
            raise InvalidRequestError(f"this version of TensorRT-LLM has no {method}") from error


async def _in_thread(function: Any, *arguments: Any) -> None:
    await in_thread(function, *arguments, name="trtllm-operation", limit=_LIMIT_SECONDS)
