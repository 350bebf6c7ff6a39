"""Calls into an engine or a plugin whose SystemExit and KeyboardInterrupt must not end the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from dynamo_worker.errors import describe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


async def contained(call: Callable[[], Awaitable[T]]) -> T:
    """Call something of an engine or a plugin and await it, in a task of its own.

    SystemExit and KeyboardInterrupt end the event loop when they leave a task, whoever waits for it. From here they
    leave as what they are to us: an error of the one who raised them.

    :raises RuntimeError: it raised one of these.
    """
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"it raised {describe(error)}") from error
