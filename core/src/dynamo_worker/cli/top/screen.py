"""Where `dynamo-worker top` shows what it sees: a live screen, or lines of text or JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli import output
from dynamo_worker.cli.top.table import (
    GONE,
    HEADINGS,
    NUMBERS,
    SILENT,
    as_json,
    fitting,
    row,
    summary,
)
from dynamo_worker.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType
    from rich.live import Live

    from dynamo_worker.cli.top.watch import WatchedWorker

#: Lines around the rows on the screen: two above, the headings, and one below.
_AROUND: Final = 4
_STYLES: Final = {GONE: "red", SILENT: "red", State.FATAL.value: "bold red", State.SERVING.value: "green"}


def is_terminal(console: Console) -> bool:
    """Return whether a console can draw over what it has drawn."""
    return console.is_terminal and not console.is_dumb_terminal


class LiveScreen:
    """Draws over itself in a terminal, on a screen of its own that the end takes away."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live: Live = Live(console=console, auto_refresh=False, screen=True)
        self._live.start()

    def show(self, title: str, workers: Sequence[WatchedWorker], trouble: str | None) -> None:
        """Draw the workers that fit."""
        self._live.update(draw(title, workers, trouble, self._console.size.height), refresh=True)

    def close(self) -> None:
        """Give the terminal back."""
        self._live.stop()


def draw(title: str, workers: Sequence[WatchedWorker], trouble: str | None, height: int) -> RenderableType:
    """Return the picture of a screen that is ``height`` lines high."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = time.monotonic()
    shown, rest = fitting(workers, max(1, height - _AROUND))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=True, overflow="ellipsis")
    several = namespaces(workers)
    for worker in shown:
        cells = row(worker, now, namespaces=several)
        state = HEADINGS.index("STATE")
        table.add_row(
            *(Text(cell, style=_STYLES.get(cell, "yellow") if i == state else "") for i, cell in enumerate(cells))
        )
    lines: list[RenderableType] = [
        Text(f"{title}  {time.strftime('%H:%M:%S')}", style="bold", no_wrap=True, overflow="ellipsis"),
        Text(trouble, style="red", no_wrap=True, overflow="ellipsis")
        if trouble
        else Text(summary(workers), no_wrap=True, overflow="ellipsis"),
        table if shown else Text(""),
        Text(rest or "Ctrl-C ends this", style="dim", no_wrap=True, overflow="ellipsis"),
    ]
    return Group(*lines)


def namespaces(workers: Sequence[WatchedWorker]) -> bool:
    """Return whether the workers are in several namespaces."""
    return len({worker.found.namespace for worker in workers}) > 1


def print_text(workers: Sequence[WatchedWorker], trouble: str | None) -> None:
    """Print all workers as a table, below each other."""
    now = time.monotonic()
    several = namespaces(workers)
    output.print_table(HEADINGS, [row(worker, now, namespaces=several) for worker in workers])
    print(summary(workers))
    if trouble:
        print(trouble)
    sys.stdout.flush()


def print_json(namespace: str | None, workers: Sequence[WatchedWorker], trouble: str | None) -> None:
    """Print one object in one line."""
    now = time.monotonic()
    found = [as_json(worker, now) for worker in workers]
    print(json.dumps({"time": time.time(), "namespace": namespace, "trouble": trouble, "workers": found}), flush=True)
