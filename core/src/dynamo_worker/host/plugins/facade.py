"""The loaded plugins of one worker: one typed method for each hook, and the only place that calls hooks."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamo_worker.errors import EngineDeadError, WorkerError, describe
from dynamo_worker.host.plugins.calling import HookOutcome, call_concurrently, call_in_order
from dynamo_worker.host.plugins.engine_flags import EngineFlags
from dynamo_worker.host.plugins.installed_plugins import (
    ENGINE_GROUP,
    LOCAL_GROUP,
    PLUGIN_GROUP,
    PluginRecord,
    discover,
    find,
    module_exists,
)
from dynamo_worker.host.plugins.local_modules import library_of, local_spec
from dynamo_worker.host.plugins.plugin_check import checked, refuse_coroutines
from dynamo_worker.host.plugins.plugin_errors import PluginError, UnknownPluginError, failed
from dynamo_worker.host.plugins.plugin_loader import (
    engine_entry,
    extension_entries,
    install_plugin,
    load_entry,
    load_module,
    new_manager,
    single,
)
from dynamo_worker.logs import get_logger
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pluggy

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import Engine, EngineContext, EngineInfo

log = get_logger(__name__)


def check(name: str) -> tuple[list[PluginRecord], list[WorkerError]]:
    """Import and validate one plugin of any kind: installed, or a module in the current directory.

    :return: a record for each plugin of that name, and the errors found.
    :raises UnknownPluginError: nothing has that name.
    """
    records: list[PluginRecord] = []
    errors: list[WorkerError] = []

    def attempt(load: Callable[[pluggy.PluginManager], PluginRecord]) -> None:
        manager = new_manager()
        try:
            record = load(manager)
            plugin = manager.get_plugin(record.name)
            refuse_coroutines(record, plugin)
            plugins = Plugins(manager, record)
            _ = plugins.engine_flags
            parser = argparse.ArgumentParser(add_help=False)
            plugins.add_arguments(parser)
            records.append(checked(record, plugin, parser))
        except PluginError as error:
            records.append(replace(error.record, error=str(error.args[0])))
            errors.append(error)

    for group in (ENGINE_GROUP, PLUGIN_GROUP):
        found = [entry for entry in find(group) if entry.name == name]
        if found:
            attempt(lambda manager, found=found: load_entry(manager, single(found)))  # type: ignore[misc]
    if not records:
        identifiers = all(part.isidentifier() for part in name.split("."))
        library = library_of(name)
        if not identifiers or library or (local_spec(name) is None and not module_exists(name)):
            known = sorted({record.name for record in discover()})
            also = f"; {library} is no plugin" if library else suggestion(name, known)
            raise UnknownPluginError(
                f"no engine, plugin or module named {name!r}{also}",
                hint=f"installed: {', '.join(known) or 'nothing'}; {install_plugin(name)}"
                + ("" if library else "; a module must be in the current directory"),
            )
        attempt(lambda manager: load_module(manager, name, None))
    return records, errors


def _unobserved(_outcome: HookOutcome) -> None:
    """Take no notice."""


class Plugins:
    """The loaded plugins of one worker, with one typed method for each hook.

    Hooks that several plugins implement are called plugin by plugin: each call has its own time limit, and a failure
    is logged with the plugin's name and never affects the next plugin.
    """

    def __init__(
        self, manager: pluggy.PluginManager, engine: PluginRecord, extensions: Sequence[PluginRecord] = ()
    ) -> None:
        self._manager = manager
        self.engine = engine
        self.extensions = tuple(extensions)
        #: Called with the outcome of each hook of the worker's life; of health checks, only with failures.
        self.observer: Callable[[HookOutcome], None] = _unobserved

    @property
    def engine_name(self) -> str:
        """Return the name under which the engine was chosen."""
        return self.engine.name

    @property
    def engine_plugin(self) -> object:
        """Return the engine's plugin: a module or an object."""
        return self._manager.get_plugin(self.engine_name)

    @property
    def engine_flags(self) -> EngineFlags:
        """Return what the engine's plugin declares about the engine's own command line.

        :raises PluginError: it claims a flag that it must not.
        """
        return EngineFlags.of(self.engine, self.engine_plugin)

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """Return the records of all plugins in use, the engine first."""
        return (self.engine, *self.extensions)

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
        :param allowed: names of installed extensions to load, or ``all`` or ``none``; no others are imported.
        :param disabled: names of installed extensions to leave out.
        :raises UnknownPluginError: a name is not installed.
        :raises PluginError: a chosen plugin cannot be used.
        """
        return cls.load_engine(engine, modules).with_extensions(modules, allowed, disabled)

    @classmethod
    def load_engine(cls, engine: str, modules: Sequence[str] = ()) -> Plugins:
        """Import and validate the chosen engine only.

        :raises UnknownPluginError: it is not installed.
        :raises PluginError: it cannot be used.
        """
        manager = new_manager()
        if engine in modules:
            return cls(manager, load_module(manager, engine, ENGINE_GROUP))
        return cls(manager, load_entry(manager, engine_entry(engine)))

    def with_extensions(self, modules: Sequence[str], allowed: Sequence[str], disabled: Sequence[str]) -> Plugins:
        """Import and validate the extensions, and return all plugins; the parameters are those of :meth:`load`."""
        local = [module for module in dict.fromkeys(modules) if module != self.engine_name]
        extensions = [load_entry(self._manager, entry) for entry in extension_entries(allowed, disabled)]
        extensions += [load_module(self._manager, module, LOCAL_GROUP) for module in local]
        return Plugins(self._manager, self.engine, extensions)

    def log_deprecations(self) -> None:
        """Log what each plugin uses that a later API version removes."""
        for record in self.records:
            for deprecation in record.deprecations:
                log.warning("Plugin uses a deprecated API", plugin=record.name, deprecation=deprecation)

    # --- The hooks, in lifecycle order

    def prepare(self, arguments: Sequence[str]) -> None:
        """Let every plugin begin slow work early; a failure is logged and does not stop the start."""
        for record in self.records:
            try:
                self._call(record.name, "prepare", arguments=arguments)
            except KeyboardInterrupt:  # noqa: PERF203 - each plugin has its own message
                raise  # Ctrl-C: the worker does not handle signals yet
            except BaseException as error:
                log.warning("Plugin hook failed", hook="prepare", plugin=record.name, error=describe(error))

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Let every plugin add its flags, the engine first.

        :raises PluginError: a plugin raised, or two plugins add the same flag.
        """
        for record in self.records:
            try:
                self._call(record.name, "add_arguments", parser=parser)
            except (WorkerError, KeyboardInterrupt):  # noqa: PERF203 - each plugin has its own message
                raise
            except BaseException as error:
                raise failed(record, "cannot add its flags", error) from error

    def configure(self, args: argparse.Namespace, context: EngineContext) -> None:
        """Let every plugin take the values of the flags, the engine first.

        :raises WorkerError: as a plugin raised it.
        :raises PluginError: a plugin raised anything else.
        """
        for record in self.records:
            try:
                self._call(record.name, "configure", args=args, context=context)
            except (WorkerError, KeyboardInterrupt):  # noqa: PERF203 - each plugin has its own message
                raise
            except BaseException as error:
                raise failed(record, "cannot be configured", error) from error

    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> Engine:
        """Create the engine without starting it.

        :raises WorkerError: as the engine's plugin raised it.
        :raises PluginError: the plugin raised anything else, or returned no engine.
        """
        try:
            engine: Any = self._manager.hook.create_engine(args=args, context=context)
        except WorkerError:
            raise
        except BaseException as error:
            raise failed(self.engine, "cannot create the engine", error) from error
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
        """Tell all plugins concurrently that the worker is ready.

        :param info: what is registered.
        :param timeout: the time limit of each plugin, in seconds.
        """
        calls = self._calls("on_ready", engine=engine, info=info)
        return self._observed(await call_concurrently("on_ready", calls, timeout))

    async def check_health(self, engine: Engine, timeout: float) -> list[HookOutcome]:
        """Ask all plugins concurrently whether the engine is healthy.

        :param timeout: the time limit of each plugin, in seconds; the outcome is a ``TimeoutError`` then.
        :return: one outcome for each plugin; failures are not logged, the caller judges them.
        :raises EngineDeadError: as soon as one plugin raises it.
        """
        calls = self._calls("check_health", engine=engine)
        outcomes = await call_concurrently(
            "check_health", calls, timeout, stop=lambda outcome: isinstance(outcome.error, EngineDeadError), quiet=True
        )
        for outcome in outcomes:
            error = outcome.error
            if isinstance(error, EngineDeadError):
                message = f"{error.args[0]} (health check of plugin {outcome.plugin!r})"
                self._observed([outcome])
                raise EngineDeadError(message, hint=error.hint) from error
        self._observed([outcome for outcome in outcomes if not outcome.ok])
        return outcomes

    async def drain(self, engine: Engine, deadline: Deadline) -> list[HookOutcome]:
        """Let all plugins finish or move their work, concurrently."""
        calls = self._calls("drain", engine=engine, deadline=deadline)
        return self._observed(await call_concurrently("drain", calls, deadline.remaining()))

    async def on_fatal_error(
        self, engine: Engine | None, error: BaseException, deadline: Deadline
    ) -> list[HookOutcome]:
        """Tell all plugins concurrently about a fatal error."""
        calls = self._calls("on_fatal_error", engine=engine, error=error, deadline=deadline)
        return self._observed(await call_concurrently("on_fatal_error", calls, deadline.remaining()))

    async def cleanup(self, engine: Engine, deadline: Deadline, limit: float | None = None) -> list[HookOutcome]:
        """Let every plugin clean up, one after another in reverse order of loading: the engine's plugin last.

        Each plugin gets at most its share of the time left, so one that hangs leaves the next its share.

        :param limit: the time limit of each plugin, in seconds.
        """

        def call(plugin: str, slice_: Deadline) -> Any:
            return self._call(plugin, "cleanup", engine=engine, deadline=slice_)

        order = list(reversed(self._implementers("cleanup")))
        return self._observed(await call_in_order("cleanup", call, order, deadline, limit))

    def _observed(self, outcomes: list[HookOutcome]) -> list[HookOutcome]:
        for outcome in outcomes:
            self.observer(outcome)
        return outcomes

    def _calls(self, hook: str, **arguments: Any) -> dict[str, Any]:
        """Return for each plugin that implements the hook a function that calls that plugin alone."""

        def bind(plugin: str) -> Any:
            return lambda: self._call(plugin, hook, **arguments)

        return {plugin: bind(plugin) for plugin in self._implementers(hook)}

    def _implementers(self, hook: str) -> list[str]:
        """Return the names of the plugins that implement a hook, the engine first."""
        names = [
            impl.plugin_name
            for impl in getattr(self._manager.hook, hook).get_hookimpls()
            if not (impl.wrapper or impl.hookwrapper)
        ]
        return [record.name for record in self.records if record.name in names]

    def _call(self, plugin: str, hook: str, **arguments: Any) -> Any:
        """Call one hook of one plugin, inside the wrappers of all plugins, and return its result."""
        others = [
            impl.plugin
            for impl in getattr(self._manager.hook, hook).get_hookimpls()
            if impl.plugin_name != plugin and not (impl.wrapper or impl.hookwrapper)
        ]
        results = self._manager.subset_hook_caller(hook, others)(**arguments)
        return next(iter(results), None)
