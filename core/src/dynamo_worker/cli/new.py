"""`dynamo-worker new NAME`: write the package of an engine plugin that passes every test at once."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from dynamo_worker.cli.package_writer import TEMPLATES, write
from dynamo_worker.cli.plugin_names import PluginNames
from dynamo_worker.errors import UsageError
from dynamo_worker.supervisor.text import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION: Final = """\
Writes the package of an engine plugin: the engine NAME in the package dynamo-worker-NAME, with tests, README and CI. A
toy is in the engine's place, so that it serves and passes `dynamo-worker check NAME --conformance` and the fault table
at once. Put your engine where the comment YOUR ENGINE HERE is, and keep the tests green."""

EPILOG: Final = """\
templates:
{templates}

examples:
  dynamo-worker new my-engine
  dynamo-worker new my-engine --template {other} --directory ~/src/my-engine
  uvx dynamo-worker new my-engine                       without an installation

Nothing is ever overwritten. docs/tutorial.md, in the repository of dynamo-worker, goes on to a published package."""

_DEFAULT: Final = next(iter(TEMPLATES))
#: Files that say that this program is installed in an environment of its own, and by what.
_TOOLS: Final = {"uv-receipt.toml": "uv", "pipx_metadata.json": "pipx"}

#: Beginning of the name of the directory with the environments that ``uvx`` makes.
_UVX_DIRECTORY: Final = "archive-v"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"new: {message}", hint=f"`{self.prog} --help` shows how")


def main(argv: Sequence[str]) -> int:
    """Write one package.

    :raises UsageError: the name is not valid or taken, or something would be overwritten.
    :raises WorkerError: the package cannot be written.
    """
    width = max(map(len, TEMPLATES)) + 2
    templates = "\n".join(f"  {name:{width}}{template.summary}" for name, template in TEMPLATES.items())
    parser = _Parser(
        "dynamo-worker new",
        description=DESCRIPTION,
        epilog=EPILOG.format(templates=templates, other=list(TEMPLATES)[-1]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="name of the engine, as for --engine")
    parser.add_argument(
        "--template", choices=list(TEMPLATES), default=_DEFAULT, help=f"see below [default: {_DEFAULT}]"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="where to write the package [default: ./dynamo-worker-NAME]"
    )
    arguments = parser.parse_args(argv)
    names = PluginNames.of(arguments.name)
    names.refuse_taken()
    directory = Path(names.distribution) if arguments.directory is None else arguments.directory
    files = write(TEMPLATES[arguments.template], names, directory)
    print(f"The engine {names.engine} in {safe(str(directory))}:")
    for path in files:
        print(f"  {path}")
    print("\nNext:")
    for command in next_commands(names, directory):
        print(f"  {command}")
    print("\nThen put your engine where the comment YOUR ENGINE HERE is; README.md says what is where.")
    return 0


def next_commands(names: PluginNames, directory: Path) -> list[str]:
    """Return the commands that install the package, check it and serve it.

    They install it beside the `dynamo-worker` that runs now, unless that is in an environment of its own, as `uvx`,
    `uv tool` and `pipx` make them.
    """
    there = f"cd {shlex.quote(str(directory))} && "
    tool = _tool()
    if tool:
        make = "uv venv && uv pip" if tool == "uv" else "python3 -m venv .venv && .venv/bin/pip"
        install, program = f"{make} install -e '.[test]'", ".venv/bin/dynamo-worker"
    else:
        install, program = f"{_installer()} install -e '.[test]'", "dynamo-worker"
    return [
        there + install,
        f"{program} check {names.engine} --conformance",
        f"{program} --engine {names.engine} --frontend",
    ]


def _tool() -> str:
    """Return what has made an environment for this program alone, ``uv`` or ``pipx``; nothing if it shares one."""
    prefix = Path(sys.prefix)
    if prefix.parent.name.startswith(_UVX_DIRECTORY):
        return "uv"
    return next((by for file, by in _TOOLS.items() if (prefix / file).exists()), "")


def _installer() -> str:
    """Return what installs into this environment: those that uv makes have no pip."""
    return "uv pip" if importlib.util.find_spec("pip") is None else "pip"
