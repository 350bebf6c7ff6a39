"""The engine that a command line chooses, looked up before the line is taken apart: it may claim some of the flags."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dynamo_worker.cli.arguments import load_settings, split
from dynamo_worker.errors import WorkerError
from dynamo_worker.host.config import config_file, settings
from dynamo_worker.host.config.options import BY_NAME
from dynamo_worker.host.config.own_flags import SWITCHES
from dynamo_worker.host.plugins.engine_flags import EngineFlags
from dynamo_worker.host.plugins.facade import Plugins

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_worker.cli.arguments import CommandLine
    from dynamo_worker.host.config.config_file import ConfigFile
    from dynamo_worker.host.config.settings import WorkerSettings


class ChosenEngine:
    """A command line, taken apart for the engine that it chooses.

    The engine's name is looked for on the command line, then in the environment, then in the configuration file. So
    ``--config`` names the worker's file if nothing else names the engine. Errors are left to whoever reads the settings
    and loads the plugins later.

    :param argv: the command line.
    :param switches: the flags of the command that are not settings.
    """

    def __init__(self, argv: Sequence[str], switches: Iterable[str] = SWITCHES) -> None:
        line = split(argv, switches)
        self._name, modules, file = _choice(line)
        self._loaded: Plugins | None = None
        claimed, command = EngineFlags().claimed, False
        if self._name:
            try:
                loaded = Plugins.load_engine(self._name, modules)
                # The file that names the engine was the worker's.
                claimed, command = loaded.engine_flags.claimed - {file}, loaded.engine_flags.command
                self._loaded = loaded
            except WorkerError:
                pass
        self.line = split(argv, switches, claimed, keep_separator=command) if claimed or command else line

    def settings(self) -> tuple[WorkerSettings, ConfigFile | None]:
        """Return the settings, and the configuration file if there is one.

        :raises UsageError: a setting or the file is wrong.
        """
        return load_settings(self.line)

    def plugins(self, values: WorkerSettings) -> Plugins:
        """Return the engine's plugin and the extensions.

        :raises UnknownPluginError: a name is not installed.
        :raises PluginError: a chosen plugin cannot be used.
        """
        if self._loaded is not None and values.engine == self._name:
            return self._loaded.with_extensions(values.plugin, values.installed_plugins, values.no_plugin)
        return Plugins.load(values.engine, values.plugin, values.installed_plugins, values.no_plugin)


def _choice(line: CommandLine) -> tuple[str, tuple[str, ...], str]:
    """Return the name of the engine, the modules that may be it, and the flag of the file that names it.

    There is no name if something about it is wrong.
    """
    flag = ""
    values: dict[str, Any] = {name: line.values[name] for name in ("engine", "plugin") if name in line.values}
    environ = {name: os.environ.get(name, "") for name in (BY_NAME["engine"].env, BY_NAME["plugin"].env)}
    try:
        chosen = settings.load(values, environ)
        path = None if chosen.engine else settings.config_path(line.values, os.environ)
        if path:
            flag = line.spelled.get("config", "")
            content = config_file.read_config(path).values
            chosen = settings.load(values | {k: content[k] for k in ("engine", "plugin") if k in content}, environ)
    except WorkerError:
        return "", (), ""
    return chosen.engine, chosen.plugin, flag
