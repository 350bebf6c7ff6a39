"""The control routes that drain a worker and return it to service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import InvalidRequestError, WorkerError, shown
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.options import SECONDS
from dynamo_worker.host.drain_phase import DRAIN, DRAIN_STATUS, RESUME
from dynamo_worker.host.requested_drain import DrainRequest
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from dynamo_worker.engine import Operation
    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.requested_drain import RequestedDrain

#: Fields of the body of a drain.
_FIELDS: Final = ("mode", "budget", "grace_period")


def drain_routes(drain: RequestedDrain, settings: WorkerSettings, *, handoff: bool = True) -> dict[str, Operation]:
    """Return the routes by name. All answer at once, with the progress; only a resume waits for discovery.

    :param handoff: whether frontends can continue the engine's requests on another worker.
    """

    async def begin(body: Any) -> None:
        asked = request(body, settings)
        if asked.mode is DrainMode.HANDOFF and not handoff:
            raise InvalidRequestError(
                "mode: requests cannot be handed off, because frontends continue no request of a text engine; "
                f"expected {DrainMode.COMPLETE} or {DrainMode.ABORT}"
            )
        await drain.drain(asked)

    async def resume(body: Any) -> None:
        _check(body, ())
        await drain.resume()

    async def status(body: Any) -> None:
        _check(body, ())
        drain.require_service()

    operations = {DRAIN: begin, RESUME: resume, DRAIN_STATUS: status}
    return {name: _answering(drain, operation) for name, operation in operations.items()}


def _answering(drain: RequestedDrain, operation: Callable[[Any], Awaitable[None]]) -> Operation:
    async def answer(body: Any) -> dict[str, Any]:
        try:
            await operation(body)
        except (InvalidRequestError, WorkerError) as error:
            return {"status": "error", "message": str(error.args[0]), **drain.report()}
        return {"status": "success", **drain.report()}

    return answer


def request(body: Any, settings: WorkerSettings) -> DrainRequest:
    """Return the drain that the body of a request describes; what it leaves out is as in a shutdown.

    :raises InvalidRequestError: it is not an object, or a field is unknown or has an invalid value.
    """
    fields = _check(body, _FIELDS)
    mode = settings.drain
    if "mode" in fields:
        try:
            mode = DrainMode(fields["mode"])
        except ValueError:
            modes = ", ".join(DrainMode)
            raise InvalidRequestError(f"mode: expected one of {modes}, got {shown(fields['mode'])}") from None
    # Only a grace period that somebody has chosen holds for all modes.
    chosen = "grace_period" in settings.model_fields_set
    grace = settings.grace_period if chosen else mode.default_grace_period
    if "grace_period" in fields:
        grace = _seconds("grace_period", fields["grace_period"])
    if "budget" in fields:
        deadline = Deadline.after(_seconds("budget", fields["budget"]))
    else:
        deadline = settings.shutdown_plan.drain_deadline(Deadline.after(0).at)
    return DrainRequest(mode, deadline, grace)


def _check(body: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the fields of a body.

    :raises InvalidRequestError: it is not an object, or a field is not one of the known ones.
    """
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise InvalidRequestError(f"expected a JSON object as the body, got {shown(body)}")
    for name in body:
        if name not in known:
            expected = f"expected {', '.join(known)}" if known else "expected an empty object"
            raise InvalidRequestError(f"unknown field {shown(name)}{suggestion(name, known)}; {expected}")
    return body


def _seconds(name: str, value: Any) -> float:
    try:
        return SECONDS.parse(value)
    except ValueError as error:
        raise InvalidRequestError(f"{name}: {error}, got {shown(value)}") from None
