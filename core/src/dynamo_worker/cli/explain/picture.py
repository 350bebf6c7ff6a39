"""The pictures of an account as SVG: the planned stages beside what happened, and curves of samples."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.cli.explain.account import number
from dynamo_worker.supervisor.text import safe

if TYPE_CHECKING:
    from dynamo_worker.cli.explain.account import Account, Stage

#: Measures in the units of the picture.
_WIDTH, _ROW, _LABEL, _NUMBERS, _TOP = 960, 34, 110, 170, 24
_BARS: Final = _WIDTH - _LABEL - _NUMBERS
_BAR: Final = 10
_CURVE_HEIGHT: Final = 140

#: Points of a curve.
_MOST_POINTS: Final = 400

#: Marks in the picture, and characters of each one's name.
_MOST_MARKS, _MOST_CHARACTERS = 8, 40


def timeline(told: Account) -> str:
    """Return the stages of the end, or of the start if the worker never served: planned above, actual below.

    The time that it served, which may be weeks, is no row.
    """
    names = [stage.name for stage in told.stages]
    served = "serve" in names
    shown = told.stages[names.index("serve") + 1 :] if served else told.stages
    if not shown:
        return _svg("No stage has ended", "The worker serves.", _TOP, [])
    origin = shown[0].start
    rows = _rows(shown, origin)
    span = max(max(start + max(stage.took, stage.planned or 0.0) for stage, start, _ in rows), 0.01)
    span = max(span, max((plan + (stage.planned or 0.0) for stage, _, plan in rows if plan is not None), default=0.0))
    scale = _BARS / span
    parts = []
    for index, (stage, start, plan) in enumerate(rows):
        parts += _row(stage, start, plan, _TOP + index * _ROW, scale)
    bottom = _TOP + len(rows) * _ROW
    parts += _axis(span, scale, bottom)
    parts += _marks(told, origin, span, scale, bottom)
    lines = [
        f"{stage.name}: took {stage.took:.2f} s"
        + ("" if stage.planned is None else f", planned at most {stage.planned:.2f} s")
        for stage in shown
    ]
    title = "The end of the worker: planned stages beside what happened" if served else "The worker's start and end"
    return _svg(title, "; ".join(lines), bottom + 44 + 16 * len(_marked(told, origin)), parts)


def _rows(shown: list[Stage], origin: float) -> list[tuple[Stage, float, float | None]]:
    """Return each stage with its actual and its planned begin, counted from the first one."""
    rows: list[tuple[Stage, float, float | None]] = []
    planned = 0.0
    for stage in shown:
        rows.append((stage, stage.start - origin, None if stage.planned is None else planned))
        planned += stage.took if stage.planned is None else stage.planned
    return rows


def _row(stage: Stage, start: float, plan: float | None, top: float, scale: float) -> list[str]:
    parts = [f'<text x="0" y="{top + 16}">{_text(stage.name)}</text>']
    if plan is not None and stage.planned is not None:
        parts.append(_bar("planned", plan * scale, stage.planned * scale, top))
    late = stage.planned is not None and stage.took > stage.planned + 0.1
    parts.append(_bar("late" if late else "took", start * scale, stage.took * scale, top + _BAR + 3))
    said = f"{stage.took:.2f} s" if stage.planned is None else f"{stage.took:.2f} s of {stage.planned:.1f} s"
    parts.append(f'<text x="{_LABEL + _BARS + 12}" y="{top + 16}">{said}</text>')
    return parts


def _bar(kind: str, left: float, length: float, top: float) -> str:
    return f'<rect class="{kind}" x="{_LABEL + left:.1f}" y="{top:.1f}" width="{max(length, 2):.1f}" height="{_BAR}"/>'


def _axis(span: float, scale: float, bottom: float) -> list[str]:
    parts = [f'<line class="axis" x1="{_LABEL}" y1="{bottom}" x2="{_LABEL + _BARS}" y2="{bottom}"/>']
    for part in range(5):
        at = span * part / 4
        x = _LABEL + at * scale
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="quiet" text-anchor="middle" x="{x:.1f}" y="{bottom + 20}">{at:.3g} s</text>')
    return parts


def _marked(told: Account, origin: float) -> list[tuple[float, str]]:
    """Return the signals and deaths in the picture, with their times."""
    found = [(number(entry.get("t")) - origin, str(entry["signal"])) for entry in told.signals]
    found += [(number(entry.get("t")) - origin, f"death of {entry['what']}") for entry in told.deaths]
    return [(at, name[:_MOST_CHARACTERS]) for at, name in sorted(found) if at >= -1.0][:_MOST_MARKS]


def _marks(told: Account, origin: float, span: float, scale: float, bottom: float) -> list[str]:
    parts = []
    for index, (at, name) in enumerate(_marked(told, origin)):
        x = _LABEL + min(max(at, 0.0), span) * scale
        y = bottom + 38 + 16 * index
        anchor = "end" if x > _LABEL + _BARS * 0.6 else "start"
        parts.append(f'<line class="mark" x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        label = f"{_text(name)} at {max(at, 0.0):.2f} s"
        parts.append(f'<text text-anchor="{anchor}" x="{x:.1f}" y="{y}">{label}</text>')
    return parts


def curve(samples: list[dict[str, Any]], name: str, title: str, unit: str, scale: float) -> str:
    """Return the curve of one field of the samples; nothing if fewer than two have it.

    :param name: the field.
    :param unit: of the values, after they are multiplied by ``scale``.
    """
    points = [(number(entry["t"]), number(entry[name]) * scale) for entry in samples if name in entry]
    if len(points) < 2:
        return ""
    step = -(-len(points) // _MOST_POINTS)
    points = [*points[:-1:step], points[-1]]
    first, last = points[0][0], points[-1][0]
    most = max(value for _, value in points)
    width, height = _WIDTH - _LABEL - 20, _CURVE_HEIGHT
    across, up = width / max(last - first, 1e-9), height / (most or 1.0)
    bottom = _TOP + height
    drawn = " ".join(f"{_LABEL + (at - first) * across:.1f},{bottom - value * up:.1f}" for at, value in points)
    values = [value for _, value in points]
    said = f"from {first:.0f} s to {last:.0f} s; lowest {min(values):.4g}, highest {most:.4g}, last {values[-1]:.4g}"
    parts = [
        f'<line class="axis" x1="{_LABEL}" y1="{bottom}" x2="{_LABEL + width}" y2="{bottom}"/>',
        f'<polyline class="curve" points="{drawn}"/>',
        f'<text x="0" y="{bottom}">0</text>',
        f'<text x="0" y="{_TOP + 10}">{most:.4g} {_text(unit)}</text>' if most else "",
        f'<text class="quiet" x="{_LABEL}" y="{bottom + 18}">{first:.1f} s</text>',
        f'<text class="quiet" text-anchor="end" x="{_LABEL + width}" y="{bottom + 18}">{last:.1f} s</text>',
    ]
    return _svg(title, f"{title} {said}", bottom + 26, parts)


def _svg(title: str, described: str, height: float, parts: list[str]) -> str:
    """Return a picture with a title and a description for those who cannot see it."""
    label = f"{title}. {described}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{_text(label)}">'
        f"<title>{_text(title)}</title><desc>{_text(described)}</desc>{''.join(parts)}</svg>"
    )


def _text(value: str) -> str:
    return escape(safe(value))
