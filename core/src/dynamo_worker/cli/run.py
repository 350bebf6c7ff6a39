"""`dynamo-worker --engine NAME`: run a worker, or show its help, version or effective settings."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dynamo_worker import __version__, logs
from dynamo_worker.cli import arguments, effective_config
from dynamo_worker.errors import WorkerError
from dynamo_worker.host import open_files
from dynamo_worker.host.status.metrics_in_memory import keep_in_memory
from dynamo_worker.supervisor.early_settings import EarlySettings
from dynamo_worker.supervisor.environment import HASH_SEED
from dynamo_worker.supervisor.interpreter import protect_multiprocessing

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from dynamo_worker.cli.arguments import CommandLine
    from dynamo_worker.cli.engine_parser import EngineParser
    from dynamo_worker.host.config.settings import WorkerSettings


def main(argv: list[str]) -> int:
    """Run a worker in this process, or show the help, the version or the effective settings."""
    line = arguments.split(argv)
    if line.switches & {"-h", "--help"}:
        return _show_help(argv, line)
    if "--version" in line.switches:
        print(f"dynamo-worker {__version__}")
        return 0
    print_only = "--print-config" in line.switches
    _prepare_runtime(argv)
    from dynamo_worker.cli.chosen_engine import ChosenEngine

    chosen = ChosenEngine(argv)
    line = chosen.line
    _set_variables(line.variables)
    values, config = chosen.settings()
    if print_only and not values.engine and not line.rest:
        _print_config(values, None, None, line.variables)
        return 0
    if not values.engine:
        arguments.check_spelling(line.rest)
    if not print_only:
        values.check()
        values = values.resolved()
    from dynamo_worker.cli.engine_parser import engine_parser, parse_engine_args
    from dynamo_worker.cli.peer_words import check_variables

    if not print_only:
        protect_multiprocessing()
    plugins = chosen.plugins(values)
    if not print_only:
        logs.setup(values.log_level, values.log_format)
        plugins.log_deprecations()
        open_files.raise_limit()  # before any child process starts, which inherits it
        os.environ.setdefault(*HASH_SEED)  # without a supervisor, at least the engine's processes have it
        keep_in_memory()
        plugins.prepare(line.rest)
    check_variables(plugins.engine_name)
    parser = engine_parser(plugins)
    engine_args = parse_engine_args(parser, line.rest, config)
    values = values.for_role(getattr(engine_args, "disaggregation_mode", None))
    if print_only:
        _print_config(values, parser, engine_args, line.variables)
        return 0
    if values.dump_config_to is not None:
        effective_config.dump(values.dump_config_to, values, parser, engine_args, line.variables)
    from dynamo_worker.host import launcher

    return launcher.run(values, plugins, engine_args)


def _prepare_runtime(argv: list[str]) -> None:
    """Set the variables that the Dynamo runtime reads when it is imported, which the engine's plugin may do first."""
    from dynamo_worker.host import tracing

    early = EarlySettings(argv)
    if early.get("log_level", "info").lower() != "debug":
        logs.quiet_runtime()
    logs.plain_runtime(early.get("log_format", "text").lower())
    tracing.prepare()


def _show_help(argv: list[str], line: CommandLine) -> int:
    """Print the help, even with a broken engine or setting."""
    from dynamo_worker.cli.help import render

    parser: EngineParser | None = None
    problem: WorkerError | None = None
    try:
        if "engine" in line.values:
            from dynamo_worker.cli.chosen_engine import ChosenEngine
            from dynamo_worker.cli.engine_parser import engine_parser

            chosen = ChosenEngine(argv)
            values, _ = chosen.settings()
            parser = engine_parser(chosen.plugins(values))
    except WorkerError as error:
        problem = error
    print(render(parser))
    if problem is not None:
        print(f"dynamo-worker: warning: {problem}", file=sys.stderr)
    return 0


def _set_variables(variables: Mapping[str, str]) -> None:
    """Set the variables of the Dynamo runtime for which there are flags."""
    for name, value in variables.items():
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


def _print_config(
    values: WorkerSettings,
    parser: EngineParser | None,
    engine_args: argparse.Namespace | None,
    variables: Mapping[str, str],
) -> None:
    """Print the effective configuration, and what is wrong with it."""
    print(effective_config.text(values, parser, engine_args, variables), end="")
    for problem in values.contradictions():
        print(f"dynamo-worker: warning: {problem}", file=sys.stderr)
