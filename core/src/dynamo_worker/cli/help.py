"""The text of `dynamo-worker --help`: examples, every flag with its default and variable, and the exit codes."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli.commands import COMMANDS
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config.option_types import GROUPS, Option
from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.host.config.own_flags import SWITCHES
from dynamo_worker.host.config.runtime_options import RUNTIME_OPTIONS
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, discover

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_worker.cli.engine_parser import EngineParser

USAGE: Final = """\
usage: dynamo-worker --engine NAME [flags] [engine flags]
       dynamo-worker COMMAND

Runs an inference engine as a worker of an NVIDIA Dynamo cluster."""

EXAMPLES: Final = {
    "dynamo-worker --engine echo --frontend": "Run a worker and an OpenAI frontend, without any other server.",
    "dynamo-worker --engine vllm --model M": "Run a worker that joins the cluster of the etcd in ETCD_ENDPOINTS.",
    "dynamo-worker --engine vllm --help": "Show this text with the engine's own flags.",
    "dynamo-worker plan --termination-grace-period 60": "Show how a shutdown would use its 60 seconds.",
}

ENGINE_FLAGS: Final = (
    "Flags the worker does not define are passed to the engine under the engine's own names. --config, --log-level, "
    "--reasoning-parser and --tool-call-parser are the engine's if it has them; --worker-config, --worker-log-level, "
    "--dyn-reasoning-parser and --dyn-tool-call-parser are always the worker's. Everything after a bare `--` is passed "
    "to the engine."
)

EXIT_CODES: Final = {
    ExitCode.STOPPED: "stopped on request; every request in flight finished or was handed off",
    ExitCode.FATAL: "the engine, the runtime or the worker failed after starting; restart it",
    ExitCode.USAGE: "the command line, the environment or the configuration file is invalid",
    ExitCode.START_FAILED: "the worker could not start; a restart will not help",
    ExitCode.UNREACHABLE: "a server that the worker needs cannot be reached; restart it",
    ExitCode.DEADLINE: "the shutdown missed its deadline and the worker was killed",
}

_COLUMN: Final = 30


def render(parser: EngineParser | None) -> str:
    """Return the help text.

    :param parser: the parser of the chosen engine, or None without one.
    """
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = [USAGE, "", "Examples:"]
    lines += [line for example, text in EXAMPLES.items() for line in _entry(example, text, width)]
    lines += ["", *textwrap.wrap(ENGINE_FLAGS, width), "", "Commands (each has --help):"]
    lines += [line for name, text in COMMANDS.items() for line in _entry(name, text, width)]
    lines += ["", "General:"]
    lines += [
        line
        for flag, text in SWITCHES.items()
        if text
        for line in _entry("-h, --help" if flag == "--help" else flag, text, width)
    ]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for row in (*OPTIONS, *RUNTIME_OPTIONS):
            if row.group == group:
                lines += _entry(_heading(row), row.summary, width)
    lines += ["", "Installed engines:"]
    lines += list(_engines(width))
    if parser is not None:
        parser.formatter_class = _Formatter
        lines += ["", f"Flags of {parser.prog.removeprefix('dynamo-worker ')}:", "", parser.format_help().rstrip()]
    lines += ["", "Exit codes:"]
    lines += [line for code, text in EXIT_CODES.items() for line in _entry(str(int(code)), text, width, column=10)]
    lines += _entry("128+n", "killed by signal n, or ended by a second signal n", width, column=10)
    return "\n".join(lines)


class _Formatter(argparse.HelpFormatter):
    """The layout of the engine's flags, aligned with the worker's."""

    def __init__(self, prog: str) -> None:
        width = max(60, min(shutil.get_terminal_size().columns, 120))
        super().__init__(prog, max_help_position=_COLUMN, width=width)


def _heading(row: Option) -> str:
    if row.kind == "switch":
        return " / ".join(row.flags)
    placeholder = row.placeholder
    return f"{', '.join(row.flags)} {placeholder}"


def _entry(heading: str, text: str, width: int, column: int = _COLUMN) -> list[str]:
    """Return one entry: the heading, and its text in the second column."""
    body = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False)
    body = [line.replace("\N{NO-BREAK SPACE}", " ") for line in body]
    first = f"  {heading}"
    if len(first) > column - 2:
        heads = textwrap.wrap(heading, width - 4, break_long_words=False, break_on_hyphens=False)
        return [*textwrap.indent("\n".join(heads), "  ").splitlines(), *(" " * column + line for line in body)]
    return [first.ljust(column) + body[0], *(" " * column + line for line in body[1:])]


def _engines(width: int) -> Iterator[str]:
    engines = [record for record in discover() if record.group == ENGINE_GROUP]
    if not engines:
        yield "  none; to add one: pip install dynamo-worker-NAME"
    for record in engines:
        state = f" ({record.status}: {record.error})" if record.error else ""
        yield from _entry(record.name, f"{record.dist} {record.version}{state}", width)
