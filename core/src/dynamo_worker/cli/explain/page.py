"""The account of an end as one HTML page: no script, no network, readable in the dark and by a screen reader."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli.explain import screen
from dynamo_worker.cli.explain.picture import curve, timeline
from dynamo_worker.supervisor.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynamo_worker.cli.explain.account import Account

#: Colours by theme and use. Texts have a contrast of 4.5 or more on both backgrounds, bars of 3 or more.
COLOURS: Final = {
    "light": {
        "background": "#ffffff", "panel": "#f3f5f8", "text": "#1a1f26", "quiet": "#4d5763", "link": "#0b57b0",
        "good": "#14652f", "bad": "#a3191f", "planned": "#7a8594", "took": "#1f63b5", "late": "#b3261e",
    },
    "dark": {
        "background": "#14181d", "panel": "#1e242b", "text": "#e8ecf1", "quiet": "#aab4c0", "link": "#8ab8ff",
        "good": "#79d495", "bad": "#ff9a94", "planned": "#8592a1", "took": "#6fa8f0", "late": "#ff8a80",
    },
}  # fmt: skip

#: The colours that texts have.
TEXTS: Final = ("text", "quiet", "link", "good", "bad")
#: The colours that shapes have.
SHAPES: Final = ("planned", "took", "late")

#: The class of cells with numbers.
_NUMBER: Final = ' class="number"'

#: Entries of one kind that the page shows.
_MOST: Final = 200

_STYLE: Final = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: var(--background); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.quiet, figcaption { color: var(--quiet) } .good { color: var(--good) } .bad { color: var(--bad) }
.cause { font-size: 1.15rem; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 1rem 0; padding: 1rem;
  background: var(--panel); border-radius: .5rem }
dt { color: var(--quiet) } dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 0; padding: 1rem; background: var(--panel); border-radius: .5rem }
svg { width: 100%; height: auto; display: block }
svg text { font: 13px system-ui, sans-serif; fill: var(--text) } svg .quiet { fill: var(--quiet) }
.planned { fill: none; stroke: var(--planned); stroke-width: 1.5 }
.took { fill: var(--took) } .late { fill: var(--late) }
.axis { stroke: var(--planned); stroke-width: 1 } .curve { fill: none; stroke: var(--took); stroke-width: 2 }
.mark { stroke: var(--late); stroke-width: 1.5; stroke-dasharray: 4 3 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% } caption { text-align: left; color: var(--quiet) }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--planned);
  overflow-wrap: anywhere } th { color: var(--quiet); font-weight: 600 } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums }
"""


def html(told: Account) -> str:
    """Return the whole page."""
    title = f"End of a worker: {told.exit.kind}" if told.exit is not None else "A worker that runs"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # A record may have texts of anybody: nothing on this page is ever executed or fetched.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(title)}</title>\n<style>{_themes()}{_STYLE}</style>\n</head>\n<body>\n<main>",
            *_body(told),
            "</main>\n</body>\n</html>\n",
        )
    )


def _themes() -> str:
    def variables(theme: str) -> str:
        return ";".join(f"--{name}:{value}" for name, value in COLOURS[theme].items())

    return f":root{{{variables('light')}}}@media(prefers-color-scheme:dark){{:root{{{variables('dark')}}}}}"


def _body(told: Account) -> Iterable[str]:
    yield f"<h1>{_heading(told)}</h1>"
    if told.exit is not None:
        yield f'<p class="cause">{_text(told.exit.reason)}</p>'
    yield f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in _facts(told))}</dl>"
    yield "<h2>The plan, and what happened</h2>"
    yield f"<figure>{timeline(told)}<figcaption>Outlined: planned at most. Filled: what it took.</figcaption></figure>"
    yield _table(
        "All stages, from the first import to the clean-up",
        ("stage", "began at, s", "planned at most, s", "took, s"),
        [(stage.name, f"{stage.start:.2f}", "" if stage.planned is None else f"{stage.planned:.2f}",
          f"{stage.took:.2f}") for stage in told.stages],
        numbers=(1, 2, 3),
    )  # fmt: skip
    yield from _curves(told)
    yield from _lists(told)
    if told.dropped:
        yield f'<p class="quiet">{told.dropped} entries in the middle of the record were dropped.</p>'


def _curves(told: Account) -> Iterable[str]:
    for name, title, unit, scale in (
        ("in_flight", "Requests in flight", "", 1.0),
        ("memory", "Memory of the container", "MiB", 1 / (1 << 20)),
        ("gpu_memory", "Memory in use on the GPUs", "MiB", 1 / (1 << 20)),
    ):
        drawn = curve(told.samples, name, title, unit, scale)
        if drawn:
            yield f"<h2>{_text(title)}</h2><figure>{drawn}</figure>"


def _lists(told: Account) -> Iterable[str]:
    kinds: tuple[tuple[str, list[tuple[str, ...]]], ...] = (
        ("Start", [(f"{entry['name']}", _number(entry.get("seconds"))) for entry in told.steps]),
        ("Hooks", [(screen.hook(entry), _number(entry.get("t"))) for entry in told.hooks]),
        ("Warnings and errors", [(f"{entry['level']}: {entry['message']}", _number(entry.get("t")))
                                 for entry in told.notes]),
    )  # fmt: skip
    for title, items in kinds:
        if items:
            yield f"<h2>{title}</h2>"
            seconds = "took, s" if title == "Start" else "at, s"
            yield _table(f"The last {_MOST} of the record, the oldest first", ("what", seconds), items, numbers=(1,))


def _heading(told: Account) -> str:
    if told.exit is None:
        return "A worker that runs"
    good = "good" if told.exit.code == 0 else "bad"
    return f'Exit code <span class="{good}">{told.exit.code}</span>: {_text(told.exit.kind.replace("-", " "))}'


def _facts(told: Account) -> list[tuple[str, str]]:
    facts = [("Worker", screen.worker(told)), ("Lived", screen.lived(told))]
    if told.exit is not None:
        facts.append(("Stage", screen.stage_of_the_cause(told.exit)))
    facts.append(("Requests", screen.requests(told)))
    facts += [("Signal", screen.signal(entry)) for entry in told.signals]
    facts += [("Death", screen.death(entry)) for entry in told.deaths]
    facts.append(("Cleaned", screen.cleaned(told.cleaned)))
    if told.exit is not None:
        facts += [("What to do next", told.exit.next), ("Runbook", told.exit.runbook)]
    facts.append(("Record", told.file))
    return facts


def _table(
    caption: str, headings: tuple[str, ...], rows: list[tuple[str, ...]], *, numbers: tuple[int, ...] = ()
) -> str:
    head = "".join(
        f'<th scope="col"{_NUMBER if column in numbers else ""}>{_text(heading)}</th>'
        for column, heading in enumerate(headings)
    )
    body = "".join(
        "<tr>" + "".join(_cell(value, number=column in numbers) for column, value in enumerate(row)) + "</tr>"
        for row in rows[-_MOST:]
    )
    table = f"<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _cell(value: str, *, number: bool) -> str:
    return f"<td{_NUMBER if number else ''}>{_text(value)}</td>"


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else ""


def _text(value: str) -> str:
    """Return a text as HTML, without characters that change how others are read."""
    return escape(safe(value))
