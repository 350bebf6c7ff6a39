"""Every hook a plugin can implement, in lifecycle order. This module is the contract with plugin authors.

A plugin is a module or an object whose functions carry ``@hookimpl`` and the name of a hook. It names only the
arguments it wants. Hooks that take the engine may be plain or ``async`` functions: the host awaits what they return,
nobody else does. A plain function that blocks cannot be interrupted, it holds up the event loop and with it all
requests: put blocking work into ``asyncio.to_thread``. A wrapper (``@hookimpl(wrapper=True)``) around such a hook sees
the coroutine, not its result.

A plugin may state which version of this contract it was written for: ``dynamo_worker_api = "1"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Sequence

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Engine, EngineContext, EngineInfo

#: Version of the hooks, ``(major, minor)``. A new hook or argument raises the minor number, anything that breaks
#: an existing plugin the major one.
API_VERSION: Final = (1, 1)

PROJECT_NAME: Final = "dynamo_worker"

hookspec: Final = pluggy.HookspecMarker(PROJECT_NAME)
#: Marks a function of a plugin as the implementation of the hook of that name.
hookimpl: Final = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def prepare(arguments: Sequence[str]) -> None:
    """Begin what takes long and needs no parsed flags: importing in other processes, for one.

    Called first, and only when a worker is about to start: not for ``--help`` and its like. What is begun here must
    end with this process, because the flags may turn out to be wrong. Must return at once. Not awaited.

    An exception is logged, and the start goes on.

    :param arguments: everything on the command line that the worker does not know.
    """


@hookspec
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's own command-line flags, under its own names and in a group of its own.

    Called for ``--engine NAME --help`` too: import the engine itself only if its flags
    cannot be known otherwise. The worker's own flags are not on this parser; a flag of the same name goes to the
    worker, unless it stands behind a bare ``--``.

    An exception ends the start (exit code 3).

    :param parser: receives everything on the command line that the worker does not know.
    """


@hookspec(firstresult=True)
def create_engine(args: argparse.Namespace, context: EngineContext) -> Engine | None:
    """Create the engine; only an engine's plugin implements this.

    Must not start anything: no process, no thread, no GPU memory. ``Engine.start`` does that. Not awaited.

    An exception ends the start (exit code 3).

    :param args: what the parser of ``add_arguments`` made of the command line.
    :param context: where the engine will live.
    """


@hookspec
def on_ready(engine: Engine, info: EngineInfo) -> Awaitable[None] | None:
    """Act on a worker that is ready: its model, if it has one, is registered, and it serves requests.

    Awaited once, all plugins concurrently, beside the requests that already arrive, for at most
    ``--health-check-timeout`` seconds. A failure is logged with the plugin's name and stops nobody else.

    :param engine: the engine that serves.
    :param info: what is registered: the engine's own information, and what the worker's flags add.
    """


@hookspec
def check_health(engine: Engine) -> Awaitable[None] | None:
    """Return if the engine is well; raise ``EngineDeadError`` if it is beyond repair.

    Awaited every ``--health-check-interval`` seconds, all plugins concurrently, each for at most
    ``--health-check-timeout`` seconds. Must be cheap and must not disturb requests.

    ``EngineDeadError`` ends the worker. Any other exception, or no answer in time, is an unhealthy result with the
    plugin's name; the monitor decides what follows.

    :param engine: the engine that serves.
    """


@hookspec
def drain(engine: Engine, deadline: Deadline) -> Awaitable[None] | None:
    """Finish or move work inside the engine that requests in flight do not show: KV transfers, offloads, batches.

    Awaited once while the worker drains, all plugins concurrently, after new requests are refused. Must be
    idempotent. A failure is logged with the plugin's name and stops nobody else.

    :param engine: the engine that drains.
    :param deadline: when the hook is cancelled.
    """


@hookspec
def on_fatal_error(engine: Engine | None, error: BaseException, deadline: Deadline) -> Awaitable[None] | None:
    """Say last words about a worker that is beyond repair: dump, notify, mark the node.

    Awaited once, all plugins concurrently, before ``cleanup``. A failure is logged and never replaces ``error``.

    :param engine: the engine, or None if it could not be created.
    :param error: what ended the worker.
    :param deadline: when the hook is cancelled; a few seconds at most.
    """


@hookspec
def cleanup(engine: Engine, deadline: Deadline) -> Awaitable[None] | None:
    """Shut the engine down: its processes, GPU memory, tasks and temporary files.

    Awaited one plugin after another, in reverse order of start: extensions first, the engine's own plugin last.
    Must work on an engine that has only half started, and do nothing when called again. A failure is logged with the
    plugin's name and stops nobody else; what is left behind, the supervisor removes.

    :param engine: the engine to shut down.
    :param deadline: when the hook is cancelled.
    """
