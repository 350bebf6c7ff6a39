"""New weights for an engine that stays up: one change at a time, their version, and what a failed change leaves."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dynamo_worker.engine import LargeOperation
from dynamo_worker.errors import EngineDeadError, InvalidRequestError, StartError, for_client
from dynamo_worker.kit.engine_arguments import switched_on
from dynamo_worker.kit.fields import refusal
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from dynamo_worker.engine import Operation
    from dynamo_worker.kit.engine_control import DiscoveryGate

log = get_logger(__name__)

_T = TypeVar("_T")

#: The reason for which an engine is out of discovery after a failed change.
FAILED: Final = "failed weight update"
#: Longest change in seconds, including the wait for requests in flight. A transfer whose sender is gone may never end.
_CHANGE_SECONDS: Final = 1800.0
#: Seconds that the members of a group have to meet, and the variable that sets another time.
_GROUP_SECONDS: Final = 30.0
_GROUP_SECONDS_ENV: Final = "DYN_RL_INIT_WEIGHTS_TIMEOUT_S"
#: Largest body of an operation that describes tensors, in bytes.
_MOST_BODY_BYTES: Final = 8 * 1024 * 1024


def add_enable_rl(group: argparse._ArgumentGroup, variable: str) -> None:
    """Add ``--enable-rl`` and ``--no-enable-rl``, without which :meth:`WeightUpdates.allow` refuses.

    :param variable: the environment variable that sets the default.
    """
    group.add_argument(
        "--enable-rl",
        action=argparse.BooleanOptionalAction,
        default=switched_on(variable),
        help="let trainers send new weights through control routes: as tensors, through a process group, over IPC. "
        "Whoever may call control routes can then execute code in the engine, because tensors are unpickled "
        f"({variable}; default: off)",
    )


def describing_tensors(operation: Operation, *, enabled: bool) -> Operation:
    """Return an operation whose bodies describe every tensor of a model, and are accordingly large.

    :param enabled: whether ``--enable-rl`` was given; if not, the operation refuses and takes no large bodies.
    """
    return LargeOperation(operation, _MOST_BODY_BYTES) if enabled else operation


class WeightUpdates:
    """Changes the weights of one engine.

    A change that fails leaves weights of which nobody knows what they are. The engine then serves nothing: it is out of
    discovery, requests end with an error that lets them migrate, and only a change that loads all weights again brings
    it back. If that fails too, the engine is dead.

    :ivar changing: whether a change is in progress; the engine may then be silent.
    :ivar failure: why the weights cannot be used; None if they can.
    """

    def __init__(
        self, gate: DiscoveryGate, end_requests: Callable[[BaseException], Awaitable[object]], *, enabled: bool
    ) -> None:
        """Start with the weights that the engine has loaded itself.

        :param end_requests: ends all requests in flight with an error.
        :param enabled: whether ``--enable-rl`` was given.
        :raises StartError: a variable is not a number of seconds.
        """
        self.changing = False
        self.failure: str | None = None
        self._gate = gate
        self._end_requests = end_requests
        self._enabled = enabled
        self._group_seconds = _group_seconds()
        self._lock = asyncio.Lock()
        self._end: str | None = None
        self._version: Any = None
        self._declared = False

    # ------------------------------------------------------------------------------------------------------- checks

    def allow(self, what: str) -> None:
        """Check that callers may do something with which they can execute code.

        :param what: the operation.
        :raises InvalidRequestError: they may not.
        """
        if not self._enabled:
            raise InvalidRequestError(f"{what} is off, because its callers can execute code; --enable-rl allows it")

    def check_usable(self) -> None:
        """Check that a request may be answered with the weights.

        :raises WorkerUnavailable: a change has failed; another worker can answer.
        """
        if self.failure is not None:
            from dynamo.llm.exceptions import WorkerUnavailable

            raise WorkerUnavailable(f"the weights are incomplete: {self.failure}")

    def check_complete(self) -> None:
        """Check that an operation may go on with the weights as they are.

        :raises InvalidRequestError: a change has failed.
        """
        if self.failure is not None:
            raise InvalidRequestError(
                f"the weights are incomplete, because the last update failed ({self.failure}); "
                "load all of them with update_weights_from_disk, or restart the worker"
            )

    def check_alive(self) -> None:
        """Check that the engine can get complete weights.

        :raises EngineDeadError: a change hangs, and the engine cannot be told to give it up; or the weights were to be
            loaded again after a failed change, and that has failed too.
        """
        if self._end is not None:
            raise EngineDeadError(self._end)

    # ------------------------------------------------------------------------------------------------------ changes

    async def update(
        self,
        work: Callable[[], Coroutine[Any, Any, _T]],
        body: Mapping[str, Any],
        *,
        complete: bool = False,
        leave: bool = True,
    ) -> _T:
        """Let ``work()`` change the weights, after other changes, and return its result.

        :param work: raises InvalidRequestError only if it has changed nothing.
        :param body: of the request for the operation; its ``weight_version`` is the version from now on.
        :param complete: whether ``work`` replaces all weights, and may so repair those that a failed change left.
        :param leave: whether the engine leaves discovery meanwhile.
        """
        async with self._lock:
            if not complete:
                self.check_complete()
            result = await self._gate.around(
                lambda: self._change(work), leave=leave, reason=FAILED, holds=lambda: self.failure is not None
            )
            if "weight_version" in body:
                self._declare(body["weight_version"])
            return result

    async def exclusively(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run something that no change of the weights may overlap, such as a pause, and return its result."""
        async with self._lock:
            return await work()

    async def meet(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Let the engine join a group with a trainer, which may block the engine until all members are there."""
        async with self._lock:
            return await self._bounded(work, self._group_seconds, "the group for weight updates")

    async def _change(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        try:
            result = await self._bounded(work, _CHANGE_SECONDS, "the weight update")
        except InvalidRequestError:
            raise
        except BaseException as error:
            reason = for_client(str(error)) or type(error).__name__
            if self.failure is not None:
                self._end = f"the weights cannot be repaired: {reason}"
            self.failure = reason
            log.error("Weight update failed; the worker serves nothing", error=error, next="update_weights_from_disk")
            await self._end_all()
            raise
        self.failure = None
        return result

    async def _bounded(self, work: Callable[[], Coroutine[Any, Any, _T]], seconds: float, what: str) -> _T:
        self.changing = True
        task = asyncio.ensure_future(work())
        try:
            await asyncio.wait({task}, timeout=seconds)
            if not task.done():
                self._end = f"{what} did not end in time ({seconds:g} s)"
                raise EngineDeadError(self._end)
            return task.result()
        finally:
            task.cancel()
            self.changing = False

    async def _end_all(self) -> None:
        try:
            from dynamo.llm.exceptions import Disconnected

            await self._end_requests(Disconnected(f"the weights are incomplete: {self.failure}"))
        except Exception as error:  # such as an engine that has died; its requests end with it
            log.warning("Requests in flight cannot be ended", error=error)

    # ------------------------------------------------------------------------------------------------------ version

    async def get_weight_version(self, _: dict[str, Any]) -> dict[str, Any]:
        """Return the ``version`` of the weights that was declared last."""
        return {"status": "ok", "version": self._version, "version_declared": self._declared}

    async def set_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        """Declare the version of the weights, without changing them."""
        if "weight_version" not in body:
            raise refusal("weight_version", "the version of the weights", None)
        self._declare(body["weight_version"])
        return {"status": "ok", "version": self._version}

    def _declare(self, version: Any) -> None:
        self._version, self._declared = version, True
        log.info("Weight version declared", version=str(version)[:200])


def _group_seconds() -> float:
    text = os.environ.get(_GROUP_SECONDS_ENV)
    if text is None:
        return _GROUP_SECONDS
    try:
        seconds = float(text)
        if 0 < seconds <= _CHANGE_SECONDS:
            return seconds
    except ValueError:
        pass
    raise StartError(f"{_GROUP_SECONDS_ENV}: expected seconds, above 0 and at most {_CHANGE_SECONDS:g}, got {text!r}")
