"""Every hook that a plugin can implement, in lifecycle order.

A plugin is a module or an object whose functions are marked with ``@hookimpl`` and named after a hook. Each function
declares only the arguments it uses. Hooks that take the engine may be plain or ``async`` functions; the worker awaits
the result. A plain function that blocks cannot be interrupted: it stops the event loop, and with it every request. Put
blocking work into ``asyncio.to_thread``. A wrapper (``@hookimpl(wrapper=True)``) around such a hook sees the coroutine,
not its result.

A plugin declares the API version it was written for: ``dynamo_worker_api = "1.1"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Sequence

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Engine, EngineContext, EngineInfo

#: Version of the plugin API, ``(major, minor)``: the hooks, and the public names that docs/plugins.md lists. Additions
#: and deprecations raise the minor number; whatever breaks an existing plugin raises the major number.
API_VERSION: Final = (1, 2)

PROJECT_NAME: Final = "dynamo_worker"

hookspec: Final = pluggy.HookspecMarker(PROJECT_NAME)
#: Marks a function of a plugin as the implementation of the hook of that name.
hookimpl: Final = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def prepare(arguments: Sequence[str]) -> None:
    """Begin slow work that needs no parsed flags, such as imports in other processes.

    Called first, and only when a worker is about to start: not for ``--help``. Must return at once. Not awaited. The
    flags may turn out to be invalid, so whatever is started here must end with this process.

    An exception is logged, and the start continues.

    :param arguments: everything on the command line that is not a flag of the worker.
    """


@hookspec
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's command-line flags, in a separate argument group.

    Also called for ``--engine NAME --help``: import the engine only if its flags cannot be known otherwise. This parser
    does not have the worker's flags; a flag with the same name as one of them goes to the worker, unless it follows a
    bare ``--`` or the plugin claims it (``claimed_flags``).

    An exception ends the start (exit code 3).

    :param parser: parses everything on the command line that is not a flag of the worker.
    """


@hookspec
def configure(args: argparse.Namespace, context: EngineContext) -> None:
    """Take the values of the flags, of one's own and of the engine's, before the engine is created.

    Called once, the engine's plugin first, and only when a worker starts: the place for an extension to check its flags
    and to keep them. Must not start a process or a thread. Not awaited.

    An exception ends the start (exit code 3; ``UsageError`` 2).

    New in API 1.2.

    :param args: the values of the flags that all plugins' ``add_arguments`` added.
    :param context: the engine's surroundings.
    """


@hookspec(firstresult=True)
def create_engine(args: argparse.Namespace, context: EngineContext) -> Engine | None:
    """Create the engine; only the engine's plugin implements this.

    Must not start a process or a thread, nor allocate GPU memory: ``Engine.start`` does. Not awaited.

    An exception ends the start (exit code 3).

    :param args: the values of the flags that ``add_arguments`` added.
    :param context: the engine's surroundings.
    """


@hookspec
def on_ready(engine: Engine, info: EngineInfo) -> Awaitable[None] | None:
    """React to the worker being ready: its model, if it has one, is registered, and it serves requests.

    Awaited once, all plugins concurrently, for at most ``--health-check-timeout`` seconds. Requests are served
    meanwhile. A failure is logged with the plugin's name and affects no other plugin; the worker keeps serving.

    New in API 1.1.

    :param engine: the engine that serves.
    :param info: the registered information: the engine's own, completed by the worker's flags.
    """


@hookspec
def check_health(engine: Engine) -> Awaitable[None] | None:
    """Return if the engine is healthy; raise ``EngineDeadError`` if it cannot recover.

    Awaited every ``--health-check-interval`` seconds, all plugins concurrently, each for at most
    ``--health-check-timeout`` seconds. Must be cheap and must not disturb requests.

    ``EngineDeadError`` ends the worker, and so does a check that does not answer in time, unless the engine is paused.
    Any other exception is logged with the plugin's name and counted, and the worker keeps serving.

    :param engine: the engine that serves.
    """


@hookspec
def drain(engine: Engine, deadline: Deadline) -> Awaitable[None] | None:
    """Finish or move work inside the engine that no request in flight shows: KV transfers, offloads, batches.

    Awaited while the worker drains, all plugins concurrently, after new requests are refused: once in a shutdown, and
    in each drain that an operator requests, after which the engine may serve again. Must be idempotent. A failure is
    logged with the plugin's name and affects no other plugin.

    :param engine: the engine that drains.
    :param deadline: when the hook is cancelled.
    """


@hookspec
def on_fatal_error(engine: Engine | None, error: BaseException, deadline: Deadline) -> Awaitable[None] | None:
    """Dump state or notify someone about a fatal error.

    Called once on a fatal error and awaited, all plugins concurrently, before ``cleanup``. A failure is logged and
    never replaces ``error``.

    :param engine: the engine, or None if it could not be created.
    :param error: the error that ends the worker.
    :param deadline: when the hook is cancelled: a few seconds from now at most.
    """


@hookspec
def cleanup(engine: Engine, deadline: Deadline) -> Awaitable[None] | None:
    """Shut the engine down: end its processes and tasks, free GPU memory, remove temporary files.

    Awaited one plugin after another: extensions first, the engine's plugin last. Must work on an engine that has only
    half started, and do nothing when called again. A failure is logged with the plugin's name and affects no other
    plugin; the supervisor removes whatever is left behind.

    :param engine: the engine to shut down.
    :param deadline: when the hook is cancelled.
    """
