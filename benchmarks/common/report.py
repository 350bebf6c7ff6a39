"""How the benchmarks talk: progress on stderr, tables on stdout, JSON and plots on request."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

_START = time.monotonic()


def progress(message: str) -> None:
    """Say on stderr what happens now."""
    print(f"[{time.monotonic() - _START:6.1f} s] {message}", file=sys.stderr, flush=True)


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are there, or None."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Format a number with about `digits` significant digits; `-` when there is none."""
    if value is None:
        return "-"
    if value == 0:
        text = "0"
    else:
        decimals = max(0, digits - 1 - int(f"{value:e}".split("e")[1]))
        text = f"{value:,.{decimals}f}".replace(",", " ")
    return f"{text} {unit}" if unit else text


def seconds(value: float | None) -> str:
    """Format a duration, in milliseconds below one second."""
    if value is None:
        return "-"
    return number(value * 1e3, "ms") if abs(value) < 1 else number(value, "s")


def spread(values: Sequence[float], unit: str = "") -> str:
    """Format the median with the range around it."""
    if not values:
        return "-"
    if len(values) == 1:
        return number(values[0], unit)
    return f"{number(median(values), unit)} ({number(min(values))}…{number(max(values))})"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is aligned to the left, the others to the right."""
    body = [list(row) for row in rows]
    widths = [max(len(row[number]) for row in [list(columns), *body]) for number in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join(aligned).rstrip()

    print(f"\n{title}")
    print(line(columns))
    print("  ".join("-" * width for width in widths))
    for row in body:
        print(line(row))
    sys.stdout.flush()


def bar(value: float | None, at_most: float | None = None, at_least: float | None = None) -> str:
    """Compare a value with its bar; return `ok`, `MISSED` or `-`."""
    if value is None:
        return "-"
    if at_most is not None and value > at_most:
        return "MISSED"
    if at_least is not None and value < at_least:
        return "MISSED"
    return "ok"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all benchmarks share."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measured values there as JSON")
    parser.add_argument(
        "--keep-logs", type=Path, metavar="DIR", help="keep the logs of all processes there (default: thrown away)"
    )


def write_json(path: Path | None, benchmark: str, settings: Mapping[str, Any], results: Any) -> None:
    """Write the results with what one needs to judge them, when a path was given."""
    if path is None:
        return
    content = {"benchmark": benchmark, "machine": machine(), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    progress(f"wrote {path}")


def machine() -> dict[str, Any]:
    """Describe the machine and the versions measured."""
    versions = {}
    for name in ("dynamo-worker", "ai-dynamo-runtime", "uvloop"):
        versions[name] = "not installed"
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()
