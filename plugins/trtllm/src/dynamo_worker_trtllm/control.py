"""Operations on TensorRT-LLM while it serves: memory, prefix cache, profiles, LoRA adapters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tensorrt_llm.executor.request import LoRARequest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.kit.engine_control import MemoryControl, profile_routes
from dynamo_worker.kit.fields import refusal
from dynamo_worker.kit.lora import LoraAdapters, OnDemand

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from dynamo_worker import EngineContext
    from dynamo_worker.kit.lora import LoraAdapter

#: Longest wait for the ranks' answer to an operation, or for the requests in flight, in seconds.
_LIMIT_SECONDS: Final = 120.0


def lora_request(adapter: LoraAdapter) -> LoRARequest:
    """Return TensorRT-LLM's description of an adapter, which accompanies each request for it.

    :raises InvalidRequestError: the adapter's directory is gone.
    """
    try:
        return LoRARequest(adapter.name, adapter.number, adapter.path)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


class Control(MemoryControl):
    """All operations of one engine."""

    REGIONS: ClassVar = ("kv_cache", "weights")

    def __init__(
        self, llm: Any, context: EngineContext, model_names: Collection[str], idle: Callable[[], Awaitable[None]]
    ) -> None:
        """Take the engine.

        :param idle: returns once the engine works on no request.
        """
        self._llm = llm
        self._idle = idle
        super().__init__(
            context,
            routes={
                "reset_prefix_cache": self.reset_prefix_cache,
                **profile_routes(self._start_profile, lambda: self._call("stop_profile")),
            },
            endpoints={"clear_kv_blocks": self.reset_prefix_cache},
            lora=LoraAdapters(OnDemand(lora_request), context, model_names) if llm.args.enable_lora else None,
        )

    async def release_memory_occupation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Release memory, if the engine was started for that, within ``timeout_s`` for the requests in flight."""
        _seconds(body)
        if getattr(self._llm.args, "sleep_config", None) is None:
            raise InvalidRequestError("the engine cannot release memory: start it with --sleep-config '{}'")
        return await super().release_memory_occupation(body)

    async def release_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        """Wait for the requests in flight, and release regions of the GPU's memory."""
        seconds = _seconds(body)
        try:
            await asyncio.wait_for(self._idle(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise RuntimeError(f"requests are still in flight after {seconds:g} s; nothing was released") from None
        await self._call("sleep", tags)

    async def resume_memory(self, tags: list[str], body: dict[str, Any]) -> None:  # noqa: ARG002 - as above
        """Allocate regions of memory again."""
        await self._call("wakeup", tags)

    async def reset_prefix_cache(self, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - it has no parameters
        """Drop all cached prefixes."""
        reset = getattr(self._llm, "reset_prefix_cache", None)
        await (self._call("reset_prefix_cache") if reset is None else _in_thread(reset))
        return {"message": "prefix cache reset"}

    async def _start_profile(self, body: dict[str, Any]) -> None:
        """Start the profiler of every rank, which writes into ``output_dir``."""
        await self._call("start_profile", await self.output_directory(body.get("output_dir")))

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


def _seconds(body: dict[str, Any]) -> float:
    """Return how long to wait for the requests in flight.

    :raises InvalidRequestError: it is no number of seconds, or too large.
    """
    seconds = body.get("timeout_s", _LIMIT_SECONDS)
    if type(seconds) not in (int, float) or not 0 <= seconds <= _LIMIT_SECONDS:
        raise refusal("timeout_s", f"a number of seconds from 0 to {_LIMIT_SECONDS:g}", seconds)
    return float(seconds)


async def _in_thread(function: Any, *arguments: Any) -> None:
    await in_thread(function, *arguments, name="trtllm-operation", limit=_LIMIT_SECONDS)
