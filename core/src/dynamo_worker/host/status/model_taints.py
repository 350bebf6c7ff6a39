"""The control route that sets the taints of a worker's model, by which routers accept, prefer or avoid the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import InvalidRequestError, shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from dynamo_worker.engine import Operation

#: The route's name, as in Dynamo's own workers.
ROUTE: Final = "update/model_taints"
#: Taints that begin like this follow from where the worker is; the runtime sets them itself.
_RESERVED: Final = "dynamo.topology/"


def taint_routes(update: Callable[[Collection[str]], Awaitable[None]]) -> dict[str, Operation]:
    """Return the route by its name.

    :param update: replaces the taints of the registered model.
    """

    async def update_taints(body: Any) -> dict[str, Any]:
        try:
            taints = _taints(body)
        except InvalidRequestError as error:
            return {"status": "error", "message": str(error)}
        await update(taints)
        return {"status": "ok", "taints": taints}

    return {ROUTE: update_taints}


def _taints(body: Any) -> list[str]:
    """Return the taints in the body of a request, sorted, each once.

    :raises InvalidRequestError: they are no list of strings, or one is reserved.
    """
    taints = body.get("taints") if isinstance(body, dict) else None
    if not isinstance(taints, list) or not all(isinstance(taint, str) for taint in taints):
        raise InvalidRequestError(f'expected {{"taints": [STRING, …]}}, got {shown(body)}')
    for taint in taints:
        if taint.startswith(_RESERVED):
            raise InvalidRequestError(f"taints: {shown(taint)}: taints that begin with {_RESERVED} are reserved")
    return sorted(set(taints))
