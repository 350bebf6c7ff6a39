"""Operations on SGLang while it serves: caches, memory, pauses, weights, profiles, LoRA adapters."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec
from sglang.srt.managers import io_struct

from dynamo_worker import InvalidRequestError
from dynamo_worker.engine import LargeOperation
from dynamo_worker.kit.engine_control import MemoryControl, profile_routes
from dynamo_worker.kit.fields import refusal
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.kit.weights import FAILED, WeightUpdates, describing_tensors
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

    from dynamo_worker import EngineContext
    from dynamo_worker.engine import Operation
    from dynamo_worker.kit.lora import LoraAdapter
    from dynamo_worker_sglang.manager import Manager

log = get_logger(__name__)

_T = TypeVar("_T")

#: What ``pause_generation`` can do with requests in flight: end them, freeze them, or put them back in the queue.
_MODES = ("abort", "in_place", "retract")
#: Longest wait for a cache that is in use, in seconds.
_LONGEST_FLUSH = 600
#: Seconds between two looks at the requests in flight, and how often the scheduler gets the chance to become idle.
_POLL_SECONDS, _SETTLE_POLLS = 0.1, 20
#: SGLang's default directory for profiles.
_PROFILES = "/tmp"  # noqa: S108 - only if it is an allowed root
#: The reason for which an engine is out of discovery between the two ends of a trainer's session.
_SESSION = "weight update session"


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
    """All operations of one engine. The mode of a pause is a reason for being out of discovery, too.

    :ivar weights: changes of the weights.
    """

    REGIONS: ClassVar = ("weights", "kv_cache", "cuda_graph")

    def __init__(
        self, manager: Manager, context: EngineContext, model_names: Collection[str], *, trainers: bool = False
    ) -> None:
        """Take the parts of a started SGLang.

        :param trainers: whether operations may let callers execute code (``--enable-rl``).
        """
        self._manager = manager
        self._trainers = trainers
        #: The names of the groups that SGLang has joined.
        self._groups: set[str] = set()
        self._session = False
        #: Set at the end of the update that is in progress; None without one.
        self._changing: asyncio.Event | None = None
        loaded = {name: ref.lora_path for name, ref in manager.lora_ref_cache.items()}
        super().__init__(
            context,
            routes={
                "flush_cache": self.flush_cache,
                "pause_generation": self.pause_generation,
                "continue_generation": self.continue_generation,
                **self._weight_routes(),
                **profile_routes(self._start_profile, manager.stop_profile),
            },
            endpoints={"clear_kv_blocks": self.flush_cache},
            lora=LoraAdapters(LoraLoader(manager), context, model_names, loaded) if manager.enable_lora else None,
        )
        self.weights = WeightUpdates(self.gate, manager.end_requests, enabled=trainers)

    def paused(self) -> bool:
        """Return whether an operation has taken the engine out of service, or blocks it."""
        return super().paused() or self.weights.changing

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
        self.weights.check_complete()
        if not await self.gate.rejoin(lambda: self._continue(body, _MODES), *_MODES):
            return {"message": f"generation continues when memory is resumed: {sorted(self.gate.reasons)}"}
        log.info("Generation continues")
        return {"message": "generation continues"}

    async def _pause(self, mode: str) -> None:
        """Pause generation unless it is paused."""
        if not self.gate.reasons.intersection((*_MODES, *self.REGIONS)):
            await self._manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode))

    async def _continue(self, body: dict[str, Any], gone: Iterable[str]) -> bool:
        """Continue generation unless another reason is left."""
        if self.gate.reasons.issubset({*gone, FAILED, _SESSION}):
            request = io_struct.ContinueGenerationReqInput(torch_empty_cache=bool(body.get("torch_empty_cache", True)))
            await self._manager.continue_generation(request)
        return True

    def routes(self) -> Mapping[str, Operation]:
        """Return all control routes by name; those on weights also say ``success``, as under Dynamo's own worker."""
        found, own = dict(super().routes()), self._weight_routes()
        return {name: _saying_success(operation) if name in own else operation for name, operation in found.items()}

    # ------------------------------------------------------------------------------------------------------ weights

    def _weight_routes(self) -> dict[str, Operation]:
        """Return the operations on weights."""
        tensors = partial(describing_tensors, enabled=self._trainers)
        return {
            "update_weights_from_disk": self.update_weights_from_disk,
            "update_weights_from_tensor": tensors(self.update_weights_from_tensor),
            "update_weights_from_distributed": describing_tensors(
                self.update_weights_from_distributed, enabled=self._trainers
            ),
            "update_weights_from_ipc": self.update_weights_from_ipc,
            "init_weights_update_group": self.init_weights_update_group,
            "destroy_weights_update_group": self.destroy_weights_update_group,
            "begin_weight_update": self.begin_weight_update,
            "end_weight_update": self.end_weight_update,
            "update_weight_version": self.update_weight_version,
            "get_weight_version": self.get_weight_version,
        }

    async def get_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the version of the weights."""
        return await self.weights.get_weight_version(body)

    async def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and load new weights from ``model_path``."""
        request = _request(io_struct.UpdateWeightFromDiskReqInput, body)
        request.model_path = await self.checkpoint(request.model_path)
        update = self._manager.update_weights_from_disk
        return await self._update(lambda: update(request), request, body, complete=True)

    async def update_weights_from_tensor(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and load the pickled ``serialized_named_tensors``."""
        self.weights.allow("update_weights_from_tensor")
        request = _request(io_struct.UpdateWeightsFromTensorReqInput, body)
        update = self._manager.update_weights_from_tensor
        return await self._update(lambda: self._in_session(lambda: update(request)), request, body)

    async def update_weights_from_distributed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and receive tensors from the members of a group."""
        self.weights.allow("update_weights_from_distributed")
        request = _request(io_struct.UpdateWeightsFromDistributedReqInput, body)
        if request.group_name not in self._groups:
            raise refusal("group_name", "a group of init_weights_update_group", request.group_name)
        update = self._manager.update_weights_from_distributed
        return await self._update(lambda: self._in_session(lambda: update(request)), request, body)

    async def update_weights_from_ipc(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave discovery, finish the requests in flight, and load what checkpoint-engine offers on sockets."""
        self.weights.allow("update_weights_from_ipc")
        request = _request(io_struct.UpdateWeightsFromIPCReqInput, body)
        answer = await self._update(lambda: self._manager.update_weights_from_ipc(request), request, body)
        self._manager.initial_weights_loaded = True
        return answer

    async def _update(
        self,
        work: Callable[[], Awaitable[tuple[Any, ...]]],
        request: Any,
        body: dict[str, Any],
        *,
        complete: bool = False,
    ) -> dict[str, Any]:
        async def update() -> tuple[Any, ...]:
            if "weights" in self.gate.reasons:
                raise InvalidRequestError("the memory of the weights is released; resume it first")
            self._changing = asyncio.Event()
            try:
                if not self._manager.is_pause:
                    await self._finish(abort=getattr(request, "abort_all_requests", False))
                if request.flush_cache:
                    await self._settle()
                return _successful(await _refusing(work()))
            finally:
                self._changing.set()
                self._changing = None

        _, message, *paused = await self.weights.update(update, body, complete=complete)
        log.info("Weights updated", source=type(request).__name__)
        return {"message": message, **({"num_paused_requests": paused[0]} if paused else {})}

    async def _finish(self, *, abort: bool) -> None:
        """Wait until no request is in flight; none begins meanwhile."""
        while await self._manager.model_update_lock.is_locked():
            if abort:
                self._manager.abort_request(abort_all=True)
            await asyncio.sleep(_POLL_SECONDS)

    async def _settle(self) -> None:
        """Wait until the cache can be flushed: the scheduler ends if that fails after an update.

        It still has a request for a moment after the last output.

        :raises InvalidRequestError: paused requests use the cache.
        """
        for _ in range(_SETTLE_POLLS):
            if (await self._manager.flush_cache()).success:
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise InvalidRequestError(
            "flush_cache: requests in flight use the cache; pause with mode retract or abort, or send flush_cache false"
        )

    async def admit(self) -> None:
        """Let a request begin, after an update of the weights that is in progress.

        :raises WorkerUnavailable: the weights cannot be used.
        """
        while self._changing is not None:
            await self._changing.wait()
        self.weights.check_usable()

    async def _in_session(self, work: Callable[[], Awaitable[tuple[Any, ...]]]) -> tuple[Any, ...]:
        """Run one update in a session of its own, unless the trainer has begun one."""
        if self._session or not hasattr(self._manager, "begin_weight_update"):
            return await work()
        _successful(await self._manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput()))
        try:
            return await work()
        finally:
            await self._manager.end_weight_update(io_struct.EndWeightUpdateReqInput())

    async def begin_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        """Begin a session of several updates; the engine is out of discovery until it ends."""
        return await self._change_session("begin_weight_update", io_struct.BeginWeightUpdateReqInput, body, begun=True)

    async def end_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        """End the session of several updates."""
        return await self._change_session("end_weight_update", io_struct.EndWeightUpdateReqInput, body, begun=False)

    async def _change_session(self, name: str, kind: Any, body: dict[str, Any], *, begun: bool) -> dict[str, Any]:
        self.weights.allow(name)
        request = _request(kind, body)

        async def change() -> tuple[Any, ...]:
            if self._session is begun:
                raise InvalidRequestError("a session has begun already" if begun else "no session has begun")
            result = _successful(await getattr(self._manager, name)(request))
            self._session = begun
            return result

        async def around() -> tuple[Any, ...]:
            return await self.gate.around(change, leave=True, reason=_SESSION, holds=lambda: self._session)

        return {"message": (await self.weights.exclusively(around))[1]}

    async def init_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        """Join a group with a trainer, which meets at ``master_address`` and ``master_port``."""
        self.weights.allow("init_weights_update_group")
        request = _request(io_struct.InitWeightsUpdateGroupReqInput, body)

        async def join() -> tuple[Any, ...]:
            return _successful(await _refusing(self._manager.init_weights_update_group(request)))

        _, message = await self.weights.meet(join)
        self._groups.add(request.group_name)
        return {"message": message}

    async def destroy_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        """Leave a group."""
        self.weights.allow("destroy_weights_update_group")
        request = _request(io_struct.DestroyWeightsUpdateGroupReqInput, body)

        async def leave() -> tuple[Any, ...]:
            return _successful(await _refusing(self._manager.destroy_weights_update_group(request)))

        _, message = await self.weights.meet(leave)
        self._groups.discard(request.group_name)
        return {"message": message}

    async def update_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        """Declare ``new_version``; requests in flight are aborted unless ``abort_all_requests`` is false."""
        request = _request(io_struct.UpdateWeightVersionReqInput, body)
        if request.abort_all_requests:
            self._manager.abort_request(abort_all=True)
        await self._manager.update_weight_version(request)
        await self.weights.set_weight_version({"weight_version": request.new_version})
        return {"message": f"Weight version updated to {request.new_version}", "new_version": request.new_version}

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


def _saying_success(operation: Operation) -> Operation:
    if isinstance(operation, LargeOperation):
        return replace(operation, operation=_saying_success(operation.operation))

    async def answer(body: dict[str, Any]) -> dict[str, Any]:
        result = await operation(body)
        return {"success": result["status"] != "error", **result}

    return answer


def _request(kind: Any, body: dict[str, Any]) -> Any:
    """Return what SGLang is asked for.

    :raises InvalidRequestError: a field is unknown, missing or of another type.
    """
    unknown = sorted(body.keys() - (set(kind.__struct_fields__) - set(io_struct.BaseReq.__struct_fields__)))
    if unknown:
        raise InvalidRequestError(f"unknown fields: {', '.join(map(str, unknown))[:200]}")
    try:
        # SGLang's classes check types only when they are decoded.
        return msgspec.convert(msgspec.to_builtins(kind(**body)), kind)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(str(error)) from error


async def _refusing(work: Awaitable[_T]) -> _T:
    """Await one of SGLang's operations, which assert that the engine allows them before they do anything."""
    try:
        return await work
    except AssertionError as error:
        raise InvalidRequestError(str(error)) from error


def _successful(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a result that begins with whether SGLang has succeeded, and a message.

    :raises RuntimeError: it has not.
    """
    success, message, *_ = result
    if not success:
        raise RuntimeError(message)
    return result
