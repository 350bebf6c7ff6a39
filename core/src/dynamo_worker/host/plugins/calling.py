"""Calling the hooks of several plugins in isolation: none can affect another or hang the host."""

from __future__ import annotations

import asyncio
import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import describe
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_worker.deadline import Deadline

log = get_logger(__name__)

#: Seconds for a cancelled hook to end before it is abandoned.
CANCEL_GRACE: Final = 0.1

#: Hooks that ignored their cancellation. The reference keeps them from being collected while they run.
_abandoned: Final[set[asyncio.Task[None]]] = set()


@dataclass(frozen=True)
class HookOutcome:
    """The outcome of one plugin's hook.

    :param hook: name of the hook.
    :param plugin: name of the plugin.
    :param duration: its duration in seconds.
    :param error: the exception that it raised; ``TimeoutError`` if it ran out of time; None if it succeeded.
    """

    hook: str
    plugin: str
    duration: float
    error: BaseException | None = None

    @property
    def ok(self) -> bool:
        """Whether the hook ended in time and raised nothing."""
        return self.error is None


async def call_concurrently(
    hook: str,
    calls: Mapping[str, Callable[[], Any]],
    timeout: float,
    *,
    stop: Callable[[HookOutcome], bool] | None = None,
    quiet: bool = False,
) -> list[HookOutcome]:
    """Call all plugins concurrently and return their outcomes, in the order of ``calls``.

    Never takes longer than ``timeout`` and a moment for cancelling, even if a hook ignores its cancellation. Only a
    plain function that blocks can delay it.

    :param calls: for each plugin a function, whose result is awaited if it is awaitable.
    :param timeout: seconds for all of them.
    :param stop: called with every outcome; True ends the wait for the others, which then have no outcome.
    :param quiet: leave the logging of failures to the caller.
    """
    started = time.monotonic()
    outcomes: dict[str, HookOutcome] = {}
    tasks = {
        asyncio.create_task(_call(hook, plugin, call, outcomes), name=f"{hook} of {plugin}"): plugin
        for plugin, call in calls.items()
    }
    pending = set(tasks)
    try:
        deadline = started + timeout
        stopped = False
        while pending and not stopped:
            done, pending = await asyncio.wait(
                pending, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            ended = [outcomes[tasks[task]] for task in done if tasks[task] in outcomes]
            stopped = stop is not None and any(stop(outcome) for outcome in ended)
        if pending and not stopped:
            for task in pending:
                outcomes[tasks[task]] = HookOutcome(
                    hook, tasks[task], time.monotonic() - started, TimeoutError(f"no answer within {timeout:.3g} s")
                )
        result = [outcomes[plugin] for plugin in calls if plugin in outcomes]
        late = await _cancel(pending)
        pending = set()
        for task in late:
            _abandon(task, hook, tasks[task])
    finally:
        # Not empty only if this call itself was cancelled: do not leave the tasks running.
        for task in pending:
            task.cancel()
            _abandoned.add(task)
            task.add_done_callback(_abandoned.discard)
    if not quiet:
        for outcome in result:
            report(outcome)
    return result


async def call_in_order(
    hook: str,
    call: Callable[[str, Deadline], Any],
    plugins: Sequence[str],
    deadline: Deadline,
    limit: float | None = None,
) -> list[HookOutcome]:
    """Call the plugins one after another and return their outcomes.

    :param call: called with the plugin and its deadline.
    :param deadline: when all of them must be done. Each gets an equal share of the time left at its turn.
    :param limit: most seconds for one of them.
    """
    outcomes = []
    for position, plugin in enumerate(plugins):
        share = deadline.remaining() / (len(plugins) - position)
        own = deadline.within(share if limit is None else min(limit, share))
        outcomes += await call_concurrently(hook, {plugin: _bind(call, plugin, own)}, own.remaining())
    return outcomes


def report(outcome: HookOutcome) -> None:
    """Log the outcome of a hook: a failure as a warning."""
    duration = round(outcome.duration, 3)
    if outcome.error is None:
        log.debug("Plugin hook finished", hook=outcome.hook, plugin=outcome.plugin, duration_s=duration)
    else:
        error = describe(outcome.error)
        log.warning("Plugin hook failed", hook=outcome.hook, plugin=outcome.plugin, duration_s=duration, error=error)


def _bind(call: Callable[[str, Deadline], Any], plugin: str, deadline: Deadline) -> Callable[[], Any]:
    return lambda: call(plugin, deadline)


async def _call(hook: str, plugin: str, call: Callable[[], Any], outcomes: dict[str, HookOutcome]) -> None:
    """Call one plugin and record its outcome, unless the caller has already given up on it."""
    started = time.monotonic()
    error: BaseException | None = None
    try:
        result = call()
        if inspect.isawaitable(result):
            await result
    except BaseException as raised:
        # CancelledError, SystemExit or KeyboardInterrupt of a plugin must not cancel or end the host, and a panic in
        # Rust code is not an Exception either.
        error = raised
    outcomes.setdefault(plugin, HookOutcome(hook, plugin, time.monotonic() - started, error))


async def _cancel(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Cancel tasks and return those that do not end."""
    if not tasks:
        return set()
    for task in tasks:
        task.cancel()
    return (await asyncio.wait(tasks, timeout=CANCEL_GRACE))[1]


def _abandon(task: asyncio.Task[None], hook: str, plugin: str) -> None:
    log.warning("Plugin hook ignores its cancellation and is abandoned", hook=hook, plugin=plugin)
    _abandoned.add(task)
    task.add_done_callback(_abandoned.discard)
