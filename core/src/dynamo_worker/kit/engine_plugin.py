"""The hooks of an engine's plugin: a plugin derives from :class:`EnginePlugin` and names its modules.

``dynamo-worker engines`` and ``--help`` import the module of every plugin, so neither this module nor a plugin's own
imports an engine. Each hook imports what it needs.
"""

from __future__ import annotations

import os
import pkgutil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from dynamo_worker.hookspecs import hookimpl

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Engine, EngineContext
    from dynamo_worker.kit.engine_lifecycle import EngineLifecycle


class EnginePlugin:
    """The hooks of an engine that derives from :class:`~dynamo_worker.kit.engine_lifecycle.EngineLifecycle`.

    The attributes name functions and classes as ``package.module:name``. A plugin may implement any hook itself
    instead; a small engine's usually has ``add_arguments`` right here.

    ``dynamo_worker_api`` is not set: only the author knows which version of the hooks a plugin was written for.
    """

    #: The engine's class, called with ``args`` and ``context``.
    engine: ClassVar[str]
    #: The class of a node of the engine that serves no requests; see :meth:`is_headless`.
    headless_engine: ClassVar[str] = ""
    #: ``add(parser)`` adds the engine's flags.
    arguments: ClassVar[str] = ""
    #: Flags of the worker that the engine's own command line also has: with this engine they are the engine's. The
    #: worker's options keep their other flags: ``--dyn-reasoning-parser`` for ``--reasoning-parser``,
    #: ``--dyn-tool-call-parser`` for ``--tool-call-parser``, ``--worker-config`` for ``--config``, and
    #: ``--worker-log-level`` for ``--log-level``. No others may be claimed.
    claimed_flags: ClassVar[tuple[str, ...]] = ()
    #: The engine's own flag for a YAML file of its flags, such as ``--config``. The worker reads the file; flags on the
    #: command line take precedence.
    flags_file: ClassVar[str] = ""
    #: Whether the engine's own command line takes the beginning of a flag for the flag, as ``argparse`` does.
    abbreviated_flags: ClassVar[bool] = False
    #: Whether the engine's command line ends with a command of somebody else after a bare ``--``. Its words reach the
    #: engine's parser unread, after that ``--``, for a positional argument with ``nargs=argparse.REMAINDER``.
    takes_command: ClassVar[bool] = False
    #: ``preload(arguments)`` starts what can be started before the command line is read.
    preload: ClassVar[str] = ""
    #: Environment variables to set before the engine is imported, in its processes too, unless the operator has.
    environment: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: Checks of the conformance suite whose findings are accepted: the check's name, without ``test_``, and why. For
    #: what an engine's own library does and the plugin cannot mend. They run all the same; findings count as waived.
    conformance_waivers: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def is_headless(self, args: argparse.Namespace) -> bool:  # noqa: ARG002 - for engines that have such nodes
        """Return whether this node belongs to an engine that serves its requests elsewhere."""
        return False

    def engine_class(self, args: argparse.Namespace) -> str:
        """Return the class that these flags choose; a plugin with several kinds of engines overrides it."""
        return self.headless_engine if self.is_headless(args) else self.engine

    @hookimpl
    def prepare(self, arguments: Sequence[str]) -> None:
        """Set the engine's variables, and start what can be started before the command line is read."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        if self.preload:
            _load(self.preload)(arguments)

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's flags."""
        if self.arguments:
            _load(self.arguments)(parser)

    @hookimpl
    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> Engine:
        """Return the engine, or this node's part of it; its ``start`` starts it."""
        engine: Engine = _load(self.engine_class(args))(args, context)
        return engine

    @hookimpl
    async def on_ready(self, engine: EngineLifecycle) -> None:
        """End the preloaded processes that were not needed, and pass the hook on."""
        from dynamo_worker.kit import preload

        preload.dismiss()
        await engine.on_ready()

    @hookimpl
    async def check_health(self, engine: EngineLifecycle) -> None:
        """Pass the hook on."""
        await engine.check_health()

    @hookimpl
    async def drain(self, engine: EngineLifecycle, deadline: Deadline) -> None:
        """Pass the hook on."""
        await engine.drain(deadline)

    @hookimpl
    def on_fatal_error(self, engine: EngineLifecycle | None) -> None:
        """Mark the engine as failed, if there is one."""
        if engine is not None:
            engine.mark_failed()

    @hookimpl
    async def cleanup(self, engine: EngineLifecycle, deadline: Deadline) -> None:
        """Shut the engine down."""
        await engine.shutdown(deadline)


def _load(path: str) -> Any:
    return pkgutil.resolve_name(path)
