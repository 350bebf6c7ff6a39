"""Calls into engines and plugins, whose SystemExit and KeyboardInterrupt must not end the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from dynamo_worker.errors import describe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


async def contained(call: Callable[[], Awaitable[T]]) -> T:
    """Await a call into an engine or a plugin, for use in a separate task.

    SystemExit and KeyboardInterrupt end the event loop when they leave a task, even if another task awaits it. This
    turns them into ordinary errors of the code that raised them.

    :raises RuntimeError: the call raised one of the two.
    """
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"it raised {describe(error)}") from error
