"""Operations on vLLM while it serves: sleep, pauses, weights, profiles, caches, LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.lora.request import LoRARequest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import fields
from dynamo_worker.kit.engine_control import EngineControl, profile_routes
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.kit.weights import WeightUpdates, describing_tensors
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker import EngineContext
    from dynamo_worker.engine import Operation
    from dynamo_worker.kit.lora import LoraAdapter

log = get_logger(__name__)

#: The reason for which a sleeping engine is out of discovery.
_ASLEEP = "asleep"
#: What ``pause_generation`` can do with requests in flight: freeze them, finish them, or end them.
_MODES: Final = ("keep", "wait", "abort")
#: vLLM's own method that loads a checkpoint.
_RELOAD: Final = "reload_weights"
#: Fields of ``update_weights_from_distributed`` that are not for the method of vLLM's workers.
_OWN_FIELDS: Final = ("engine_rpc", "weight_version", "allow_unpaused", "reset_prefix_cache")


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
    """All operations of one engine.

    A paused engine stays in discovery: requests wait until it continues.

    :ivar weights: changes of the weights.
    """

    def __init__(
        self, llm: AsyncLLM, context: EngineContext, model_names: Collection[str], *, trainers: bool = False
    ) -> None:
        """Take a started vLLM.

        :param trainers: whether operations may let callers execute code (``--enable-rl``).
        """
        self._llm = llm
        self._paused = False
        super().__init__(
            context,
            routes={
                "sleep": self.sleep,
                "wake_up": self.wake_up,
                "reset_prefix_cache": self.reset_prefix_cache,
                **self._trainer_routes(large=trainers),
                **profile_routes(self._start_profile, llm.stop_profile),
            },
            endpoints={"clear_kv_blocks": self.reset_prefix_cache},
            lora=None if llm.vllm_config.lora_config is None else LoraAdapters(LoraLoader(llm), context, model_names),
        )
        self.weights = WeightUpdates(self.gate, self._end_requests, enabled=trainers)

    def paused(self) -> bool:
        """Return whether an operation has taken the engine out of service, or blocks it."""
        return super().paused() or self._paused or self.weights.changing

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
            if await self._llm.is_sleeping():
                return False
            if self._paused:  # to wake up is to continue
                await self._llm.pause_generation(mode="keep", clear_cache=False)
            return True

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

    # ------------------------------------------------------------------------------------------------------ trainers

    def _trainer_routes(self, *, large: bool) -> dict[str, Operation]:
        """Return the operations that trainers call; their answers say ``ok``, as those of Dynamo's own worker.

        :param large: whether some take large bodies.
        """
        return {
            "liveness_probe": self.liveness_probe,
            "pause_generation": self.pause_generation,
            "resume_generation": self.resume_generation,
            "flush_cache": self.flush_cache,
            "abort_request": self.abort_request,
            "update_weights_from_disk": self.update_weights_from_disk,
            "update_weights_from_distributed": describing_tensors(self.update_weights_from_distributed, enabled=large),
            "update_weights_from_tensor": self.update_weights_from_tensor,
            "init_weights_update_group": describing_tensors(self.init_weights_update_group, enabled=large),
            "destroy_weights_update_group": self.destroy_weights_update_group,
            "get_weight_version": self.get_weight_version,
            "set_weight_version": self.set_weight_version,
        }

    async def get_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the version of the weights."""
        return await self.weights.get_weight_version(body)

    async def set_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        """Declare the version of the weights."""
        return await self.weights.set_weight_version(body)

    async def liveness_probe(self, _: dict[str, Any]) -> dict[str, Any]:
        """Ask whether the engine is alive."""
        await self._llm.check_health()
        return {"status": "ok", "alive": True}

    async def pause_generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Pause generation; ``mode`` is ``keep`` (default), ``wait`` or ``abort``; ``clear_cache`` drops prefixes."""
        mode, clear = body.get("mode", _MODES[0]), fields.boolean("clear_cache", body.get("clear_cache", False))
        if mode not in _MODES:
            raise fields.refusal("mode", f"one of {', '.join(_MODES)}", mode)

        async def pause() -> None:
            await self._llm.pause_generation(mode=mode, clear_cache=clear)
            self._paused = True

        await self.weights.exclusively(pause)
        log.info("Generation paused")
        return {"status": "ok", "message": "Engine paused", "mode": mode, "clear_cache": clear}

    async def resume_generation(self, _: dict[str, Any]) -> dict[str, Any]:
        """Continue generation."""

        async def resume() -> None:
            self.weights.check_complete()
            if _ASLEEP in self.gate.reasons:
                raise InvalidRequestError("the engine is asleep; wake it up first")
            await self._llm.resume_generation()
            self._paused = False

        await self.weights.exclusively(resume)
        log.info("Generation continues")
        return {"status": "ok", "message": "Engine resumed"}

    async def flush_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop all cached prefixes."""
        await self.reset_prefix_cache(body)
        return {"status": "ok", "message": "Cache flushed"}

    async def abort_request(self, body: dict[str, Any]) -> dict[str, Any]:
        """End the request ``request_id``; its answer so far is complete."""
        request_id = fields.string("request_id", body.get("request_id"))
        await self._llm.abort(request_id)
        return {"status": "ok", "request_id": request_id}

    async def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        """Load new weights from ``model_path`` into the paused engine."""
        method = fields.string("engine_rpc", body.get("engine_rpc", _RELOAD))
        if method != _RELOAD:
            self.weights.allow("engine_rpc")
        path = await self.checkpoint(fields.string("model_path", body.get("model_path")))
        arguments = {"weights_path" if method == _RELOAD else "weight_path": path}
        return await self._update(method, arguments, body, complete=True)

    async def update_weights_from_distributed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Let the method ``engine_rpc`` of vLLM's workers receive weights, with the other fields as its arguments."""
        self.weights.allow("update_weights_from_distributed")
        method = fields.string("engine_rpc", body.get("engine_rpc", "update_weights_from_path"))
        unpaused = fields.boolean("allow_unpaused", body.get("allow_unpaused", False))
        reset = fields.boolean("reset_prefix_cache", body.get("reset_prefix_cache", True))
        if unpaused and reset:
            raise InvalidRequestError(
                "an update of a serving engine cannot reset the prefix cache: send reset_prefix_cache false, or call "
                "pause_generation first"
            )
        arguments = {name: value for name, value in body.items() if name not in _OWN_FIELDS}
        return await self._update(method, arguments, body, unpaused=unpaused, reset=reset)

    async def update_weights_from_tensor(self, _: dict[str, Any]) -> dict[str, Any]:
        """Say that vLLM has no such operation."""
        raise InvalidRequestError(
            "vLLM takes no tensors in requests; send them with update_weights_from_distributed and the methods of "
            "vLLM's weight transfer (--weight-transfer-config) or of --worker-extension-cls"
        )

    async def init_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        """Let the method ``engine_rpc`` of vLLM's workers join a group with a trainer."""
        await self._meet("init_weights_update_group", "init_broadcaster", body)
        return {"status": "ok", "message": "Weight update group initialized"}

    async def destroy_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        """Let the method ``engine_rpc`` of vLLM's workers leave the group."""
        await self._meet("destroy_weights_update_group", "destroy_broadcaster", body)
        return {"status": "ok", "message": "Weight update group destroyed"}

    async def _meet(self, name: str, default: str, body: dict[str, Any]) -> None:
        self.weights.allow(name)
        method = fields.string("engine_rpc", body.get("engine_rpc", default))
        arguments = {name: value for name, value in body.items() if name != "engine_rpc"}
        await self.weights.meet(lambda: self._call(method, arguments))
        log.info("Weight update group changed", method=method)

    async def _update(
        self,
        method: str,
        arguments: dict[str, Any],
        body: dict[str, Any],
        *,
        complete: bool = False,
        unpaused: bool = False,
        reset: bool = True,
    ) -> dict[str, Any]:
        async def update() -> None:
            if not (self._paused or unpaused):
                raise InvalidRequestError("call pause_generation first, and resume_generation after the update")
            await self._call(method, arguments)
            if reset and not await self._drop_prefixes():
                raise RuntimeError("the KV cache still holds prefixes of the old weights")

        # Requests wait for a paused engine in any case.
        await self.weights.update(update, body, complete=complete, leave=False)
        log.info("Weights updated", source=method)
        version = {"version": body.get("weight_version", "unknown"), "version_declared": "weight_version" in body}
        return {"status": "ok", **version}

    async def _drop_prefixes(self) -> bool:
        """Drop all cached prefixes; requests that are kept are computed again."""
        reset = self._llm.reset_prefix_cache
        dropped: bool = await reset(reset_connector=True)
        return dropped or await reset(reset_running_requests=True, reset_connector=True)

    async def _call(self, method: str, arguments: dict[str, Any]) -> None:
        """Call a method of all of vLLM's workers.

        :raises InvalidRequestError: they have no such method.
        """
        try:
            await self._llm.collective_rpc(method, kwargs=arguments)
        except Exception as error:
            if f"object has no attribute {method!r}" in str(error):
                raise InvalidRequestError(
                    f"vLLM's workers have no method {method!r:.80}; name one with engine_rpc, or add it with "
                    "--worker-extension-cls"
                ) from error
            raise

    async def _end_requests(self, error: BaseException) -> None:
        """End all requests with an error, and stop the work for them."""
        states = dict(self._llm.output_processor.request_states)
        for state in states.values():
            if state.queue is not None:
                state.queue.put(error)
        await self._llm.abort(list(states), internal=True)
