"""Validation of a plugin object: its API version, its hooks and their arguments."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import __version__, hookspecs
from dynamo_worker.hookspecs import API_VERSION, PROJECT_NAME
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, LOCAL_GROUP, PluginRecord
from dynamo_worker.host.plugins.local_modules import library_of
from dynamo_worker.host.plugins.plugin_errors import PluginError
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pluggy

#: The attribute in which a plugin declares the API version it was written for.
API_ATTRIBUTE: Final = "dynamo_worker_api"


def validated_hooks(manager: pluggy.PluginManager, record: PluginRecord, plugin: object) -> tuple[str, ...]:
    """Check a plugin object and return the names of the hooks it implements, in lifecycle order.

    :raises PluginError: it is not a valid plugin, or was written for another version of the API.
    """
    if inspect.isclass(plugin):
        raise PluginError(
            replace(record, status="broken"),
            f"{record}: expected a module or an object, got the class {record.value}",
            hint=f"point the entry point at an instance: `plugin = {plugin.__name__}()`",
        )
    _check_api(record, plugin)
    return _check_hooks(manager, record, plugin)


def _check_api(record: PluginRecord, plugin: object) -> None:
    """Check the API version that a plugin declares; one that declares none may use any.

    :raises PluginError: it was written for another major version, or for a newer minor one.
    """
    declared = getattr(plugin, API_ATTRIBUTE, None)
    if declared is None:
        return
    here = ".".join(map(str, API_VERSION))
    try:
        parts = declared if isinstance(declared, (tuple, list)) else str(declared).split(".")
        major, minor = (*(int(part) for part in parts), 0, 0)[:2]
    except ValueError:
        raise PluginError(
            replace(record, status="incompatible"),
            f'{record}: expected a version such as "{here}" as {API_ATTRIBUTE}, got {declared!r}',
            hint="report this to the plugin's author",
        ) from None
    if major == API_VERSION[0] and minor <= API_VERSION[1]:
        return
    newer = (major, minor) > API_VERSION
    plugin_package = record.dist or record.name
    raise PluginError(
        replace(record, status="incompatible"),
        f"{record} needs version {major}.{minor} of the plugin API; dynamo-worker {__version__} provides {here}",
        hint=f"upgrade dynamo-worker, or install an older {plugin_package}"
        if newer
        else f"upgrade {plugin_package}: API {major} is no longer supported",
    )


def _check_hooks(manager: pluggy.PluginManager, record: PluginRecord, plugin: object) -> tuple[str, ...]:
    """Check each hook of a plugin against its specification and return their names, in lifecycle order.

    An unknown hook is accepted if it is marked ``optionalhook``: it belongs to a newer API version.
    """
    specs = hook_signatures()
    implemented, from_the_future = [], False
    for attribute, function, options in _hookimpls(manager, plugin):
        hook = options.get("specname") or attribute
        where = _definition(function)
        if hook not in specs:
            if options.get("optionalhook"):
                from_the_future = True
                continue
            raise PluginError(
                replace(record, status="incompatible"),
                f"{record} implements an unknown hook {hook!r}{suggestion(hook, specs)} ({where})",
                hint=f"the hooks are: {', '.join(specs)}; mark a hook of a newer API version with "
                "@hookimpl(optionalhook=True)",
            )
        _check_arguments(record, attribute, function, hook, specs[hook])
        implemented.append(hook)
    if not implemented and not from_the_future and not record.dist and (library := library_of(record.name)):
        raise PluginError(
            replace(record, status="broken"),
            f"{record} implements no hook: its module is that of {library}",
            hint="give a module of your own another name",
        )
    if record.group == ENGINE_GROUP and "create_engine" not in implemented:
        unmarked = callable(getattr(plugin, "create_engine", None))
        raise PluginError(
            replace(record, status="broken"),
            f"{record} does not implement the hook create_engine"
            + (": its function of that name is not marked with @hookimpl" if unmarked else ""),
            hint="mark it: `from dynamo_worker import hookimpl`" if unmarked else "an engine must implement it",
        )
    if not implemented and not from_the_future:
        raise PluginError(
            replace(record, status="broken"),
            f"{record} implements no hook",
            hint="mark its functions with `@hookimpl` (`from dynamo_worker import hookimpl`)",
        )
    if record.group != ENGINE_GROUP and "create_engine" in implemented:
        raise PluginError(
            replace(record, status="broken"),
            f"{record} implements create_engine, but it was not chosen as the engine",
            hint=f"use `-p {record.name} --engine {record.name}`"
            if record.group == LOCAL_GROUP
            else f"its entry point belongs in the group {ENGINE_GROUP}",
        )
    return tuple(hook for hook in specs if hook in implemented)


def _check_arguments(
    record: PluginRecord, attribute: str, function: Any, hook: str, specified: tuple[str, ...]
) -> None:
    where = _definition(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in specified:
            raise PluginError(
                replace(record, status="broken"),
                f"{record}: hook {attribute!r} has an unknown argument {str(parameter)!r}"
                f"{suggestion(parameter.name, specified)} ({where})",
                hint=f"the hook is {hook}({', '.join(specified)}); name only the arguments you want",
            )
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise PluginError(
                replace(record, status="broken"),
                f"{record}: argument {parameter.name!r} of hook {attribute!r} must be an ordinary argument, neither "
                f"positional-only nor keyword-only ({where})",
                hint=f"the hook is {hook}({', '.join(specified)})",
            )


def _hookimpls(manager: pluggy.PluginManager, plugin: object) -> Iterator[tuple[str, Any, Any]]:
    """Yield the attribute name, the function and the ``@hookimpl`` options of each implementation of a hook."""
    for attribute in dir(plugin):
        try:
            options = manager.parse_hookimpl_opts(plugin, attribute)
        except Exception:  # noqa: S112 - an unreadable attribute is not a hook
            continue
        if options is not None:
            yield attribute, getattr(plugin, attribute), options


def hook_signatures() -> dict[str, tuple[str, ...]]:
    """Return the arguments of every hook, in lifecycle order."""
    return {
        name: tuple(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if hasattr(function, f"{PROJECT_NAME}_spec")
    }


def _definition(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
