"""What people see when something goes wrong, and small tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dynamo_worker.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console


def unknown_command(word: str) -> UsageError:
    """Return the error for a first word that is no command."""
    from dynamo_worker.cli import COMMANDS
    from dynamo_worker.host.installed_plugins import ENGINE_GROUP, discover
    from dynamo_worker.suggest import suggestion

    if any(record.name == word for record in discover() if record.group == ENGINE_GROUP):
        return UsageError(f"there is no command {word!r}", hint=f"to run this engine: dynamo-worker --engine {word}")
    return UsageError(
        f"there is no command {word!r}{suggestion(word, COMMANDS)}",
        hint=f"the commands are {', '.join(COMMANDS)}; without one, a worker runs: dynamo-worker --engine NAME",
    )


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: with lines and colour for a person, plain columns for a pipe."""
    if sys.stdout.isatty():
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console(highlight=False, markup=False).print(table)
        return
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def console(**options: Any) -> Console:
    """Return a console whose output ends like that of ``print`` when its reader is gone; rich's own exits with 1."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PlainConsole(**options)


def only_flags(argv: Sequence[str], allowed: Sequence[str], usage: str) -> set[str]:
    """Return the flags given to a small command.

    :raises UsageError: there is something else.
    """
    from dynamo_worker.suggest import suggestion

    for word in argv:
        if word not in allowed:
            raise UsageError(f"unknown argument {word!r}{suggestion(word, allowed)}", hint=f"usage: {usage}")
    return set(argv)
