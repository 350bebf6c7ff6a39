"""What ``dynamo-worker check`` finds in a plugin beyond its validation: its flags, and the methods of its engine."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamo_worker.errors import StartError, describe
from dynamo_worker.host.plugins.flags import colliding
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, PluginRecord
from dynamo_worker.host.plugins.plugin_errors import PluginError

if TYPE_CHECKING:
    import argparse

#: Hooks whose result is not awaited.
_PLAIN_HOOKS = ("prepare", "add_arguments", "configure", "create_engine")


def refuse_coroutines(record: PluginRecord, plugin: Any) -> None:
    """Check that the hooks that are not awaited are plain functions.

    :param plugin: the module or the object.
    :raises PluginError: one is a coroutine function.
    """
    for hook in _PLAIN_HOOKS:
        function = getattr(plugin, hook, None)
        if hook in record.hooks and inspect.iscoroutinefunction(function):
            code = inspect.unwrap(function).__code__
            raise PluginError(
                replace(record, status="broken"),
                f"{record}: {hook} is a coroutine function, which the worker does not await "
                f"({code.co_filename}:{code.co_firstlineno})",
                hint="write `def` instead of `async def`",
            )


def checked(record: PluginRecord, plugin: Any, parser: argparse.ArgumentParser) -> PluginRecord:
    """Return the record of a loaded plugin with warnings.

    :param plugin: the module or the object.
    :param parser: has the plugin's flags and no others.
    :raises PluginError: its engine lacks a method, or has one of the wrong kind.
    """
    warnings = [
        f"its flag {flag} is the worker's, too: the worker takes it, and the engine gets it only after a bare `--` "
        "(rename it; `claimed_flags` can claim those for which the worker has another name)"
        for flag in colliding(parser, plugin)
    ]
    named = getattr(plugin, "engine", None)
    if record.group == ENGINE_GROUP and isinstance(named, str):
        warnings += _check_methods(record, named)
    return replace(record, warnings=tuple(warnings))


def _check_methods(record: PluginRecord, named: str) -> list[str]:
    """Check the methods of the engine's class and return warnings.

    :param named: the class, as ``package.module:name``.
    :raises PluginError: a method is missing or of the wrong kind.
    """
    from dynamo_worker.host.requests.engine_checks import EngineChecks

    try:
        engine = pkgutil.resolve_name(named)
    except Exception as error:
        return [f"its engine {named} cannot be imported here, so its methods were not checked: {describe(error)}"]
    try:
        EngineChecks(f"class {named}").methods(engine)
    except StartError as error:
        raise PluginError(replace(record, status="broken"), f"{record}: {error.args[0]}", hint=error.hint) from None
    return []
