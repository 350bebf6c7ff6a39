"""Loading plugins: choose their entry points, import what they name, and register it."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import pluggy

from dynamo_worker import hookspecs
from dynamo_worker.deprecation import collect_deprecations
from dynamo_worker.hookspecs import PROJECT_NAME
from dynamo_worker.host.plugins.installed_plugins import (
    ENGINE_GROUP,
    LOCAL_GROUP,
    PLUGIN_GROUP,
    PluginRecord,
    find,
    is_loaded,
    record_of,
    reference,
    source,
)
from dynamo_worker.host.plugins.local_modules import importable, library_of
from dynamo_worker.host.plugins.plugin_errors import (
    PluginError,
    UnknownPluginError,
    failed,
    install_hint,
    way_out,
    where,
)
from dynamo_worker.host.plugins.plugin_imports import what_moved
from dynamo_worker.host.plugins.plugin_validation import validated_hooks
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint
    from types import ModuleType

    from dynamo_worker.errors import WorkerError


# --- Choosing entry points


def engine_entry(name: str) -> EntryPoint:
    """Return the entry point of the chosen engine.

    :raises UnknownPluginError: no engine was chosen, or none of this name is installed.
    :raises PluginError: several packages offer the name.
    """
    entries = find(ENGINE_GROUP)
    found = [entry for entry in entries if entry.name == name]
    installed = sorted({entry.name for entry in entries})
    listing = f"installed engines: {', '.join(installed)}" if installed else "no engine is installed"
    if not name:
        raise UnknownPluginError(f"no engine was chosen ({listing})", hint="choose one with --engine NAME")
    if not found:
        raise UnknownPluginError(
            f"unknown engine {name!r}{suggestion(name, installed)} ({listing})",
            hint=install_plugin(name) + ("" if library_of(name) else f", or load your own module with `-p {name}`"),
        )
    return single(found)


def install_plugin(name: str) -> str:
    """Return how the plugin of this name may be installed; it has the name of its package by convention only."""
    return f"install its plugin (`pip install dynamo-worker-{name}`, if that is its package)"


def extension_entries(allowed: Sequence[str], disabled: Sequence[str]) -> list[EntryPoint]:
    """Return the entry points of the extensions to load.

    :param allowed: names of installed extensions, or ``all`` or ``none``.
    :param disabled: names of installed extensions to leave out.
    :raises UnknownPluginError: one of the names is not installed.
    :raises PluginError: several packages offer a name.
    """
    entries = find(PLUGIN_GROUP)
    names = sorted({entry.name for entry in entries})
    listed = [] if tuple(allowed) in (("all",), ("none",)) else allowed
    for flag, name in [("installed-plugins", name) for name in listed] + [("no-plugin", name) for name in disabled]:
        if name not in names:
            raise UnknownPluginError(
                f"--{flag} {name}: no plugin of that name is installed{suggestion(name, names)}",
                hint=f"installed plugins: {', '.join(names) or 'none'}",
            )
    return [single([e for e in entries if e.name == name]) for name in names if is_loaded(name, allowed, disabled)]


def single(entries: Sequence[EntryPoint]) -> EntryPoint:
    """Return the only entry point of a name.

    :raises PluginError: there are several.
    """
    if len(entries) == 1:
        return entries[0]
    record = record_of(entries[0])
    offers = " and ".join(f"{source(entry)} ({entry.value})" for entry in entries)
    raise PluginError(
        replace(record, status="ambiguous"),
        f"several packages offer the {record.kind} {record.name!r}: {offers}",
        hint="uninstall all but one of them",
    )


# --- Importing and validating


def new_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the hooks and has no plugin yet."""
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def load_entry(manager: pluggy.PluginManager, entry: EntryPoint) -> PluginRecord:
    """Import the object that an entry point names and register it.

    :raises PluginError: it cannot be imported, or is not a valid plugin.
    """
    record = record_of(entry)
    module_name, attributes = reference(entry)
    if module_name is None:
        raise PluginError(
            replace(record, status="broken"),
            f"{record}: expected `module` or `module:object` as its entry point, got {entry.value!r}",
            hint=f"report this to the author of {record.dist}",
        )
    with collect_deprecations() as deprecations:
        module = _import(record, module_name)
        try:
            plugin = reduce(getattr, attributes, module)
        except AttributeError as error:
            raise PluginError(
                replace(record, status="broken"),
                f"{record}: its entry point names {entry.value!r}, but {error}",
                hint=f"the package is broken: reinstall or upgrade {record.dist}",
            ) from error
        record = _register(manager, record, plugin)
    return replace(record, deprecations=tuple(deprecations))


def load_module(manager: pluggy.PluginManager, name: str, group: str | None) -> PluginRecord:
    """Import a local module and register it.

    :param group: the kind of plugin to load it as; None decides by its hooks.
    :raises UnknownPluginError: there is no such module.
    :raises PluginError: it cannot be imported, or is not a valid plugin.
    """
    record = PluginRecord(name, group or LOCAL_GROUP, name)
    if name.endswith(".py") or "/" in name:
        raise UnknownPluginError(
            f"-p {name}: expected the name of a module, got a file",
            hint=f"change to its directory and use `-p {os.path.basename(name).removesuffix('.py')}`",
        )
    with collect_deprecations() as deprecations:
        with importable(name):
            module = _import(record, name)
        if group is None and hasattr(module, "create_engine"):
            record = replace(record, group=ENGINE_GROUP)
        record = _register(manager, record, module)
    return replace(record, deprecations=tuple(deprecations))


def _import(record: PluginRecord, module: str) -> ModuleType:
    """Import a plugin's module; turn each failure into its own message."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if what_moved(error) is not None:
            raise failed(record, "cannot be imported", error) from error
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise _module_missing(record, missing) from error
        raise PluginError(
            replace(record, status="missing"),
            f"{record} needs the Python package {missing!r}, which is not installed ({where(error)})",
            hint=install_hint(record, missing),
        ) from error
    except SystemExit as error:
        raise PluginError(
            replace(record, status="broken"),
            f"{record} exited while it was being imported: SystemExit({error.code!r}) ({where(error)})",
            hint=way_out(record),
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise failed(record, "cannot be imported", error) from error


def _module_missing(record: PluginRecord, module: str) -> WorkerError:
    if not record.dist:
        return UnknownPluginError(
            f"-p {record.name}: no module {module!r} in the current directory or on the Python path",
            hint="change to the directory that contains it, or set PYTHONPATH",
        )
    return PluginError(
        replace(record, status="missing"),
        f"{record}: its module {module!r} is missing",
        hint=f"the package is broken: reinstall {record.dist}",
    )


def _register(manager: pluggy.PluginManager, record: PluginRecord, plugin: object) -> PluginRecord:
    """Validate a plugin object and register it under its name."""
    record = replace(record, hooks=validated_hooks(manager, record, plugin))
    if manager.has_plugin(record.name):  # an extension may share the engine's name
        record = replace(record, name=f"plugin:{record.name}")
    try:
        manager.register(plugin, name=record.name)
    except (pluggy.PluginValidationError, ValueError, Warning) as error:  # a filter may turn warnings into errors
        reason = " ".join(str(error).split())
        raise PluginError(
            replace(record, status="broken"), f"{record} cannot be registered: {reason}", hint=way_out(record)
        ) from error
    return replace(record, status="ok")
