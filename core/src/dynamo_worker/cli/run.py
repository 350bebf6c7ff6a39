"""`dynamo-worker --engine NAME`: run a worker, or show its help, version or effective settings."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dynamo_worker import __version__, logs
from dynamo_worker.cli import arguments
from dynamo_worker.errors import WorkerError
from dynamo_worker.host import open_files
from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.host.status.metrics_in_memory import keep_in_memory
from dynamo_worker.supervisor.environment import HASH_SEED
from dynamo_worker.supervisor.interpreter import protect_multiprocessing
from dynamo_worker.supervisor.text import without_secrets

if TYPE_CHECKING:
    import argparse

    from dynamo_worker.cli.arguments import CommandLine, EngineParser
    from dynamo_worker.host.config.settings import WorkerSettings


def main(argv: list[str]) -> int:
    """Run a worker in this process, or show the help, the version or the effective settings."""
    line = arguments.split(argv)
    if line.switches & {"-h", "--help"}:
        return _show_help(line)
    if "--version" in line.switches:
        print(f"dynamo-worker {__version__}")
        return 0
    values, config = arguments.load_settings(line)
    print_only = "--print-config" in line.switches
    if print_only and not values.engine and not line.rest:
        _print_config(values, None, None)
        return 0
    if not values.engine:
        arguments.check_spelling(line.rest)
    if not print_only:
        values.check()
        values = values.resolved()
    from dynamo_worker.host.plugins.facade import Plugins

    if not print_only:
        protect_multiprocessing()
    plugins = Plugins.load(values.engine, values.plugin, values.installed_plugins, values.no_plugin)
    if not print_only:
        logs.setup(values.log_level, values.log_format)
        plugins.log_deprecations()
        open_files.raise_limit()  # before any child process starts, which inherits it
        os.environ.setdefault(*HASH_SEED)  # without a supervisor, at least the engine's processes have it
        keep_in_memory()
        plugins.prepare(line.rest)
    parser = arguments.engine_parser(plugins)
    engine_args = arguments.parse_engine_args(parser, line.rest, config)
    if print_only:
        _print_config(values, parser, engine_args)
        return 0
    if values.log_level != "debug":
        logs.quiet_runtime()
    if values.log_format == "json":
        os.environ.setdefault("DYN_LOGGING_JSONL", "true")
    from dynamo_worker.host import launcher

    return launcher.run(values, plugins, engine_args)


def _show_help(line: CommandLine) -> int:
    """Print the help, even with a broken engine or setting."""
    from dynamo_worker.cli.help import render

    parser: EngineParser | None = None
    problem: WorkerError | None = None
    try:
        if "engine" in line.values:
            from dynamo_worker.host.plugins.facade import Plugins

            values, _ = arguments.load_settings(line)
            parser = arguments.engine_parser(
                Plugins.load(values.engine, values.plugin, values.installed_plugins, values.no_plugin)
            )
    except WorkerError as error:
        problem = error
    print(render(parser))
    if problem is not None:
        print(f"dynamo-worker: warning: {problem}", file=sys.stderr)
    return 0


def _print_config(values: WorkerSettings, parser: EngineParser | None, engine_args: argparse.Namespace | None) -> None:
    """Print all settings as YAML, with the origin of each value in a comment."""
    import yaml

    def scalar(value: object) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        return text.removesuffix("\n").removesuffix("\n...")

    dumped = values.model_dump(mode="json")
    lines = [
        (f"{row.name}: {scalar(without_secrets(row.name, dumped[row.name]))}", str(values.origin(row.name)))
        for row in OPTIONS
        if row.name != "config"  # not a key of the file
    ]
    if parser is not None and engine_args is not None:
        changed = {k: v for k, v in vars(engine_args).items() if v != parser.get_default(k)}
        for key, value in changed.items():
            shown = value if isinstance(value, (str, int, float, bool, list, dict)) else str(value)
            if not any("engine_args:" in text for text, _ in lines):
                lines.append(("engine_args:", "only values that differ from the engine's defaults"))
            lines.append((f"  {key}: {scalar(without_secrets(key, shown))}", "command line or file"))
    print(f"# dynamo-worker {__version__}: effective settings" + (f", with {values.config}" if values.config else ""))
    width = min(max(len(text) for text, _ in lines), 48)
    for text, origin in lines:
        print(f"{text.ljust(width)}  # {origin}")
    for problem in values.contradictions():
        print(f"dynamo-worker: warning: {problem}", file=sys.stderr)
