"""What commands print: errors, tables, and the end of both streams."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, TYPE_CHECKING, Any

from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.supervisor.text import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console


def print_error(error: Exception) -> None:
    """Print an expected error to stderr."""
    with contextlib.suppress(OSError):
        print(f"dynamo-worker: error: {safe(str(error))}", file=sys.stderr)


def finish_output(code: int) -> int:
    """Flush the standard streams and return the exit code, which is an error code if flushing fails.

    Without this, the interpreter would flush them at exit, and replace the exit code with 120 on failure.

    :param code: the exit code so far.
    """
    error = _flush(sys.stdout)
    if error is not None and code == ExitCode.STOPPED:
        code = SIGNAL_BASE + 13
        if not isinstance(error, BrokenPipeError):
            code = ExitCode.FATAL
            print_error(OSError(f"cannot write output: {error.strerror}"))
    _flush(sys.stderr)
    return code


def _flush(stream: IO[str]) -> OSError | None:
    """Flush a stream; on failure, discard its buffer and return the error."""
    try:
        stream.flush()
    except OSError as error:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stream.fileno())
        return error
    return None


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: with colours on a terminal, as plain columns otherwise."""
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
    """Return a console that raises ``BrokenPipeError`` on a closed pipe, as ``print`` does; rich's own exits with 1."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PlainConsole(**options)
