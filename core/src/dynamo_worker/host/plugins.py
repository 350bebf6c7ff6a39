"""Plugins: importing and validating the chosen ones, and the typed facade that calls their hooks.

Everything that can be wrong with a plugin has one message of its own here: what, why, where, and what to do next.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from dataclasses import replace
from functools import reduce
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any, Final

import pluggy

from dynamo_worker import hookspecs
from dynamo_worker.errors import EngineDeadError, StartError, UsageError, WorkerError, describe
from dynamo_worker.hookspecs import API_VERSION, PROJECT_NAME
from dynamo_worker.host.calling import HookOutcome, call_concurrently, call_in_order
from dynamo_worker.host.installed_plugins import (
    ENGINE_GROUP,
    LOCAL_GROUP,
    PLUGIN_GROUP,
    PluginRecord,
    discover,
    find,
    is_loaded,
    module_exists,
    record_of,
    reference,
    source,
)
from dynamo_worker.logs import get_logger
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Engine, EngineContext, EngineInfo

log = get_logger(__name__)

#: Where the plugin declares which version of the hooks it was written for.
API_ATTRIBUTE: Final = "dynamo_worker_api"


class PluginError(StartError):
    """A chosen plugin cannot be used (exit code 3). ``record`` says which one, with its status."""

    def __init__(self, record: PluginRecord, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.record = record


class UnknownPluginError(UsageError):
    """The command line names an engine or a plugin that is not installed (exit code 2)."""


def check(name: str) -> tuple[list[PluginRecord], list[WorkerError]]:
    """Import and validate one plugin, whichever kind it is: installed, or a module in the current directory.

    :return: a record with the result for each plugin of that name, and what is wrong in full.
    :raises UnknownPluginError: there is nothing of that name.
    """
    records: list[PluginRecord] = []
    errors: list[WorkerError] = []

    def attempt(load: Callable[[pluggy.PluginManager], PluginRecord]) -> None:
        manager = _new_manager()
        try:
            record = load(manager)
            Plugins(manager, record).add_arguments(argparse.ArgumentParser(add_help=False))
            records.append(record)
        except PluginError as error:
            records.append(replace(error.record, error=str(error.args[0])))
            errors.append(error)

    for group in (ENGINE_GROUP, PLUGIN_GROUP):
        found = [entry for entry in find(group) if entry.name == name]
        if found:
            attempt(lambda manager, found=found: _load_entry(manager, _single(found)))  # type: ignore[misc]
    if not records:
        identifiers = all(part.isidentifier() for part in name.split("."))
        if not identifiers or (_local_spec(name) is None and not module_exists(name)):
            known = sorted({record.name for record in discover()})
            raise UnknownPluginError(
                f"there is no engine, plugin or module {name!r}{suggestion(name, known)}",
                hint=f"installed: {', '.join(known) or 'nothing'}; a module must lie in the current directory",
            )
        attempt(lambda manager: _load_module(manager, name, None))
    return records, errors


class Plugins:
    """The loaded plugins of one worker, with one typed method for each hook.

    Nobody else calls hooks. Fan-out hooks call every plugin by itself: under its own time limit, with its failure
    logged under its name, never in the way of the next plugin.
    """

    def __init__(
        self, manager: pluggy.PluginManager, engine: PluginRecord, extensions: Sequence[PluginRecord] = ()
    ) -> None:
        self._manager = manager
        self.engine = engine
        self.extensions = tuple(extensions)

    @property
    def engine_name(self) -> str:
        """Return the name by which the engine was chosen."""
        return self.engine.name

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """Return the records of all plugins in use, the engine first."""
        return (self.engine, *self.extensions)

    def describe(self) -> str:
        """Return the plugins in one line for logs and reports: ``vllm-0.3.1 otel-1.0``."""
        return " ".join(f"{record.name}-{record.version}" if record.version else record.name for record in self.records)

    @classmethod
    def load(
        cls,
        engine: str,
        modules: Sequence[str] = (),
        allowed: Sequence[str] = ("all",),
        disabled: Sequence[str] = (),
    ) -> Plugins:
        """Import and validate the chosen engine, the installed extensions and local modules.

        :param engine: name of the engine: an entry point, or one of ``modules``.
        :param modules: modules to load without packaging; the current directory is searched first.
        :param allowed: names of installed extensions to load, or ``all`` or ``none``; others are not imported.
        :param disabled: names of installed extensions to leave out.
        :raises UnknownPluginError: a name is not installed.
        :raises PluginError: a chosen plugin cannot be used.
        """
        manager = _new_manager()
        local = [module for module in dict.fromkeys(modules) if module != engine]
        if engine in modules:
            chosen = _load_module(manager, engine, ENGINE_GROUP)
        else:
            chosen = _load_entry(manager, _engine_entry(engine))
        extensions = [_load_entry(manager, entry) for entry in _extension_entries(allowed, disabled)]
        extensions += [_load_module(manager, module, LOCAL_GROUP) for module in local]
        return cls(manager, chosen, extensions)

    # --- The hooks, in lifecycle order

    def prepare(self, arguments: Sequence[str]) -> None:
        """Let every plugin begin what takes long; what fails is missed later, if at all."""
        for record in self.records:
            try:
                self._call(record.name, "prepare", arguments=arguments)
            except KeyboardInterrupt:  # noqa: PERF203 - each plugin has its own message
                raise  # Ctrl-C: nobody has taken the signal yet
            except BaseException as error:
                log.warning("Plugin hook failed", hook="prepare", plugin=record.name, error=describe(error))

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Let every plugin add its flags, the engine first.

        :raises PluginError: a plugin raised, or two plugins want the same flag.
        """
        for record in self.records:
            try:
                self._call(record.name, "add_arguments", parser=parser)
            except (WorkerError, KeyboardInterrupt):  # noqa: PERF203 - each plugin has its own message
                raise
            except BaseException as error:
                raise _failed(record, "cannot add its flags", error) from error

    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> Engine:
        """Return the new engine; nothing has been started.

        :raises WorkerError: as the engine raised it.
        :raises PluginError: any other exception, or no engine.
        """
        try:
            engine: Any = self._manager.hook.create_engine(args=args, context=context)
        except WorkerError:
            raise
        except BaseException as error:
            raise _failed(self.engine, "cannot create the engine", error) from error
        if engine is None or inspect.isawaitable(engine):
            got = "nothing" if engine is None else "an awaitable (it must be a plain function)"
            if inspect.iscoroutine(engine):
                engine.close()
            raise PluginError(
                self.engine,
                f"{self.engine}: create_engine returned {got} instead of an engine",
                hint="report this to the plugin's author",
            )
        created: Engine = engine
        return created

    async def on_ready(self, engine: Engine, info: EngineInfo, timeout: float) -> list[HookOutcome]:
        """Tell every plugin at once that the worker is ready.

        :param timeout: the longest time for one plugin in seconds.
        """
        return await call_concurrently("on_ready", self._calls("on_ready", engine=engine, info=info), timeout)

    async def check_health(self, engine: Engine, timeout: float) -> list[HookOutcome]:
        """Ask every plugin at once whether the engine is well.

        :param timeout: the longest wait in seconds; a plugin that needs longer has an outcome with ``TimeoutError``.
        :return: one outcome for each plugin, also those that found the engine unwell: the caller judges them.
        :raises EngineDeadError: as soon as one plugin says that the engine is beyond repair.
        """
        calls = self._calls("check_health", engine=engine)
        outcomes = await call_concurrently(
            "check_health", calls, timeout, stop=lambda outcome: isinstance(outcome.error, EngineDeadError), quiet=True
        )
        for outcome in outcomes:
            error = outcome.error
            if isinstance(error, EngineDeadError):
                message = f"{error.args[0]} (health check of plugin {outcome.plugin!r})"
                raise EngineDeadError(message, hint=error.hint) from error
        return outcomes

    async def drain(self, engine: Engine, deadline: Deadline, limit: float | None = None) -> list[HookOutcome]:
        """Let every plugin finish or move its work, all at once.

        :param limit: the longest time for one plugin in seconds, if it is to end before ``deadline``.
        """
        deadline = deadline if limit is None else deadline.within(limit)
        calls = self._calls("drain", engine=engine, deadline=deadline)
        return await call_concurrently("drain", calls, deadline.remaining())

    async def on_fatal_error(
        self, engine: Engine | None, error: BaseException, deadline: Deadline, limit: float | None = None
    ) -> list[HookOutcome]:
        """Let every plugin say its last words, all at once.

        :param limit: the longest time for one plugin in seconds, if it is to end before ``deadline``.
        """
        deadline = deadline if limit is None else deadline.within(limit)
        calls = self._calls("on_fatal_error", engine=engine, error=error, deadline=deadline)
        return await call_concurrently("on_fatal_error", calls, deadline.remaining())

    async def cleanup(self, engine: Engine, deadline: Deadline, limit: float | None = None) -> list[HookOutcome]:
        """Let every plugin clean up, one after another, in reverse order of start: the engine's own plugin last.

        A plugin gets at most ``limit`` seconds, and no more than its share of what is left, so that one that hangs
        does not eat the time of those behind it.
        """

        def call(plugin: str, slice_: Deadline) -> Any:
            return self._call(plugin, "cleanup", engine=engine, deadline=slice_)

        return await call_in_order("cleanup", call, list(reversed(self._implementers("cleanup"))), deadline, limit)

    def _calls(self, hook: str, **arguments: Any) -> dict[str, Any]:
        """Return a function for every plugin that implements the hook; calling it calls that plugin alone."""

        def bind(plugin: str) -> Any:
            return lambda: self._call(plugin, hook, **arguments)

        return {plugin: bind(plugin) for plugin in self._implementers(hook)}

    def _implementers(self, hook: str) -> list[str]:
        """Return the names of the plugins that implement a hook, in the order of registration."""
        names = [
            impl.plugin_name
            for impl in getattr(self._manager.hook, hook).get_hookimpls()
            if not (impl.wrapper or impl.hookwrapper)
        ]
        return [record.name for record in self.records if record.name in names]

    def _call(self, plugin: str, hook: str, **arguments: Any) -> Any:
        """Call one hook of one plugin, inside the wrappers of all, and return what it returned."""
        others = [
            impl.plugin
            for impl in getattr(self._manager.hook, hook).get_hookimpls()
            if impl.plugin_name != plugin and not (impl.wrapper or impl.hookwrapper)
        ]
        results = self._manager.subset_hook_caller(hook, others)(**arguments)
        return next(iter(results), None)


# --- Choosing entry points


def _engine_entry(name: str) -> EntryPoint:
    entries = find(ENGINE_GROUP)
    found = [entry for entry in entries if entry.name == name]
    installed = sorted({entry.name for entry in entries})
    listing = f"installed engines: {', '.join(installed)}" if installed else "no engine is installed"
    if not name:
        raise UnknownPluginError(f"no engine was chosen ({listing})", hint="choose one with --engine NAME")
    if not found:
        raise UnknownPluginError(
            f"there is no engine {name!r}{suggestion(name, installed)} ({listing})",
            hint=f"install it with `pip install dynamo-worker-{name}` if that is its package, or load a module of "
            f"yours with `-p {name}`",
        )
    return _single(found)


def _extension_entries(allowed: Sequence[str], disabled: Sequence[str]) -> list[EntryPoint]:
    entries = find(PLUGIN_GROUP)
    names = sorted({entry.name for entry in entries})
    listed = [] if tuple(allowed) in (("all",), ("none",)) else allowed
    for flag, name in [("installed-plugins", name) for name in listed] + [("no-plugin", name) for name in disabled]:
        if name not in names:
            raise UnknownPluginError(
                f"--{flag} {name}: no plugin of that name is installed{suggestion(name, names)}",
                hint=f"installed plugins: {', '.join(names) or 'none'}",
            )
    return [_single([e for e in entries if e.name == name]) for name in names if is_loaded(name, allowed, disabled)]


def _single(entries: Sequence[EntryPoint]) -> EntryPoint:
    """Return the only entry point of a name, or refuse to guess between several."""
    if len(entries) == 1:
        return entries[0]
    record = record_of(entries[0])
    offers = " and ".join(f"{source(entry)} ({entry.value})" for entry in entries)
    raise PluginError(
        replace(record, status="ambiguous"),
        f"{record.kind} {record.name!r} is offered by several packages: {offers}",
        hint="uninstall all but one of them",
    )


# --- Importing and validating


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def _load_entry(manager: pluggy.PluginManager, entry: EntryPoint) -> PluginRecord:
    """Import the object that an entry point names and register it."""
    record = record_of(entry)
    module_name, attributes = reference(entry)
    if module_name is None:
        raise PluginError(
            replace(record, status="broken"),
            f"{record}: its entry point {entry.value!r} is neither `module` nor `module:object`",
            hint=f"report this to the author of {record.dist}",
        )
    module = _import(record, module_name)
    try:
        plugin = reduce(getattr, attributes, module)
    except AttributeError as error:
        raise PluginError(
            replace(record, status="broken"),
            f"{record}: its entry point names {entry.value!r}, but {error}",
            hint=f"the package is broken: reinstall or upgrade {record.dist}",
        ) from error
    return _register(manager, record, plugin)


def _load_module(manager: pluggy.PluginManager, name: str, group: str | None) -> PluginRecord:
    """Import a local module and register it.

    :param group: what it is wanted as; None takes it for what it looks like.
    """
    record = PluginRecord(name, group or LOCAL_GROUP, name)
    if name.endswith(".py") or "/" in name:
        raise UnknownPluginError(
            f"-p {name}: a plugin is named as a module, not as a file",
            hint=f"go to its directory and use `-p {os.path.basename(name).removesuffix('.py')}`",
        )
    module = _import_local(record, name)
    if group is None and hasattr(module, "create_engine"):
        record = replace(record, group=ENGINE_GROUP)
    return _register(manager, record, module)


class _Local:
    """Finds one module in the current directory, and nothing else that lies there.

    :param spec: the module, or the package that holds it.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec = spec

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """Return where the module is, None for any other."""
        return self._spec if name == self._spec.name else None


def _local_spec(name: str) -> ModuleSpec | None:
    """Return the module in the current directory that has this name or is the first part of it, or None."""
    top = name.partition(".")[0]
    try:
        spec = PathFinder.find_spec(top, [os.getcwd()])
    except FileNotFoundError:  # the directory is gone
        return None
    if spec is not None and spec.loader is None and module_exists(top):  # a directory without code hides no package
        return None
    return spec


def _import_local(record: PluginRecord, name: str) -> ModuleType:
    """Import a module from the current directory, or from the Python path if it is not there.

    The directory itself never gets on the path: what else lies in it, such as a ``uvloop.py``, nobody imports.
    """
    spec = _local_spec(name)
    if spec is None:
        return _import(record, name)
    finder = _Local(spec)
    sys.meta_path.insert(0, finder)
    try:
        return _import(record, name)
    finally:
        sys.meta_path.remove(finder)


def _import(record: PluginRecord, module: str) -> ModuleType:
    """Import a plugin's module; every way to fail has a message of its own."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise _module_missing(record, missing) from error
        raise PluginError(
            replace(record, status="missing"),
            f"{record} needs the Python package {missing!r}, which is not installed ({_where(error)})",
            hint=_install_hint(record, missing),
        ) from error
    except SystemExit as error:
        raise PluginError(
            replace(record, status="broken"),
            f"{record} ended the interpreter while it was imported: SystemExit({error.code!r}) ({_where(error)})",
            hint=_way_out(record),
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _failed(record, "cannot be imported", error) from error


def _module_missing(record: PluginRecord, module: str) -> WorkerError:
    if not record.dist:
        return UnknownPluginError(
            f"-p {record.name}: there is no module {module!r} in the current directory or on the Python path",
            hint="go to the directory that holds it, or set PYTHONPATH",
        )
    return PluginError(
        replace(record, status="missing"),
        f"{record}: its own module {module!r} cannot be found",
        hint=f"the package is broken: reinstall {record.dist}",
    )


def _register(manager: pluggy.PluginManager, record: PluginRecord, plugin: object) -> PluginRecord:
    """Validate a plugin object and register it under its name."""
    if inspect.isclass(plugin):
        raise PluginError(
            replace(record, status="broken"),
            f"{record}: {record.value} is a class; a plugin is a module or an object",
            hint=f"name an instance in the entry point: `plugin = {plugin.__name__}()`",
        )
    _check_api(record, plugin)
    record = replace(record, hooks=_check_hooks(manager, record, plugin))
    if manager.has_plugin(record.name):  # an extension may have the name of the engine
        record = replace(record, name=f"plugin:{record.name}")
    try:
        manager.register(plugin, name=record.name)
    except (pluggy.PluginValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PluginError(
            replace(record, status="broken"), f"{record} cannot be registered: {reason}", hint=_way_out(record)
        ) from error
    return replace(record, status="ok")


def _check_api(record: PluginRecord, plugin: object) -> None:
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
            f'{record}: {API_ATTRIBUTE} = {declared!r} is no version such as "{here}"',
            hint="report this to the plugin's author",
        ) from None
    if major != API_VERSION[0] or minor > API_VERSION[1]:
        newer = (major, minor) > API_VERSION
        raise PluginError(
            replace(record, status="incompatible"),
            f"{record} was written for version {major}.{minor} of the hooks; this dynamo-worker has {here}",
            hint=f"upgrade {'dynamo-worker' if newer else record.dist or record.name}",
        )


def _check_hooks(manager: pluggy.PluginManager, record: PluginRecord, plugin: object) -> tuple[str, ...]:
    """Check every hook of a plugin against its specification and return their names, in lifecycle order."""
    specs = hook_signatures()
    implemented = []
    for attribute, function, hook in _hookimpls(manager, plugin):
        where = _definition(function)
        if hook not in specs:
            raise PluginError(
                replace(record, status="incompatible"),
                f"{record} implements a hook {hook!r} that does not exist{suggestion(hook, specs)} ({where})",
                hint=f"the hooks are: {', '.join(specs)}",
            )
        for parameter in inspect.signature(function).parameters.values():
            specified = f"{hook}({', '.join(specs[hook])})"
            if parameter.name not in specs[hook]:
                raise PluginError(
                    replace(record, status="broken"),
                    f"{record}: hook {attribute!r} has an argument {str(parameter)!r} that does not exist"
                    f"{suggestion(parameter.name, specs[hook])} ({where})",
                    hint=f"the hook is {specified}; name only the arguments you want",
                )
            if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise PluginError(
                    replace(record, status="broken"),
                    f"{record}: argument {parameter.name!r} of hook {attribute!r} is no ordinary argument ({where})",
                    hint=f"the hook is {specified}",
                )
        implemented.append(hook)
    if record.group == ENGINE_GROUP and "create_engine" not in implemented:
        unmarked = callable(getattr(plugin, "create_engine", None))
        raise PluginError(
            replace(record, status="broken"),
            f"{record} does not implement the hook create_engine"
            + (": its function of that name is not marked with @hookimpl" if unmarked else ""),
            hint="mark it: `from dynamo_worker import hookimpl`" if unmarked else "an engine must implement it",
        )
    if not implemented:
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
            else f"its entry point belongs into the group {ENGINE_GROUP}",
        )
    return tuple(hook for hook in specs if hook in implemented)


def _hookimpls(manager: pluggy.PluginManager, plugin: object) -> Iterator[tuple[str, Any, str]]:
    """Yield the attribute name, the function and the hook of everything marked with ``@hookimpl``."""
    for attribute in dir(plugin):
        try:
            options = manager.parse_hookimpl_opts(plugin, attribute)
        except Exception:  # noqa: S112 - an attribute that cannot be read is no hook
            continue
        if options is not None:
            yield attribute, getattr(plugin, attribute), options.get("specname") or attribute


def hook_signatures() -> dict[str, tuple[str, ...]]:
    """Return the arguments of every hook, in lifecycle order."""
    return {
        name: tuple(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if hasattr(function, f"{PROJECT_NAME}_spec")
    }


# --- Messages


def _failed(record: PluginRecord, what: str, error: BaseException) -> PluginError:
    return PluginError(
        replace(record, status="broken"),
        f"{record} {what}: {describe(error)} ({_where(error)})",
        hint=_way_out(record),
    )


def _way_out(record: PluginRecord) -> str:
    if record.group == PLUGIN_GROUP:
        return f"upgrade {record.dist}, or leave the plugin out with --no-plugin {record.name}"
    return f"upgrade or reinstall {record.dist}" if record.dist else "correct the module"


def _install_hint(record: PluginRecord, missing: str) -> str:
    """Return how to install what a plugin needs: by an extra of its package if it has any."""
    try:
        extras = distribution(record.dist).metadata.get_all("Provides-Extra") or [] if record.dist else []
    except PackageNotFoundError:
        extras = []
    if extras:
        choice = " or ".join(f"`pip install '{record.dist}[{extra}]'`" for extra in extras)
        return f"install it: {choice}"
    without = f", or leave the plugin out with --no-plugin {record.name}" if record.group == PLUGIN_GROUP else ""
    return f"install it: `pip install {missing.partition('.')[0]}`{without}"


def _where(error: BaseException) -> str:
    """Return the last line of a plugin that an exception passed, as ``file:line``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(os.path.abspath(__file__))
    foreign = [
        frame
        for frame in frames
        if not frame.filename.startswith("<frozen")
        and os.path.dirname(os.path.abspath(frame.filename)) not in (own, os.path.dirname(importlib.__file__))
        and f"{os.sep}pluggy{os.sep}" not in frame.filename
    ]
    # A SyntaxError is not raised by a line of the plugin: it carries its own place.
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return f"{foreign[-1].filename}:{foreign[-1].lineno}" if foreign else "no line of the plugin was reached"


def _definition(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
