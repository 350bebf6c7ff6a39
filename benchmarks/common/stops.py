"""The table of stops and faults: every scenario measured as often as wanted, with its bars."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from common import scenarios
from common.load import LoadError
from common.report import median, progress, seconds, table
from common.subjects import OURS
from common.workbench import Workbench, WorkbenchError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence


def measure(
    bench: Workbench,
    chosen: Sequence[scenarios.Scenario],
    kinds: Sequence[str],
    titles: Mapping[str, str],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Measure scenarios as often as `--repeat` says, print their table and return all values.

    :param kinds: the workers that take part.
    :param titles: what the table calls them.
    :param arguments: with `repeat`, `grace` and `streams`.
    """
    results: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    try:
        for scenario in chosen:
            for kind in scenario.kinds:
                if kind in kinds:
                    row, result = _measured(bench, scenario, kind, titles, arguments)
                    rows.append(row)
                    results.append(result)
    except KeyboardInterrupt:
        progress("interrupted: the table has what was measured until now")
    table(
        f"Stops and faults, medians of {arguments.repeat}; after the signal, or after the grace period where marked +g",
        [
            "",
            "out of discovery",
            "out of frontend",
            "exit",
            "all gone",
            "after leaving",
            "after last answer",
            "code",
            "streams",
            "left: proc/shm/files/entries",
            "bars",
        ],
        rows,
    )
    return results


def _measured(
    bench: Workbench,
    scenario: scenarios.Scenario,
    kind: str,
    titles: Mapping[str, str],
    arguments: argparse.Namespace,
) -> tuple[list[str], dict[str, Any]]:
    """Measure one scenario with one worker as often as wanted; return its row and its values."""
    outcomes = []
    for turn in range(arguments.repeat):
        progress(f"{scenario.name}: {titles[kind]}, {turn + 1} of {arguments.repeat}")
        try:
            outcome = scenarios.measure(bench, scenario, kind, arguments.grace, arguments.streams)
        except (WorkbenchError, LoadError) as error:
            progress(f"  not measured: {error}")
            continue
        outcomes.append(outcome)
        _remarks(outcome)
    if not outcomes:
        title = f"{scenario.name}: {titles[kind]}"
        return [title, "not measured", *[""] * 9], {"scenario": scenario.name, "worker": kind, "outcomes": []}
    return _row(scenario, kind, titles[kind], outcomes)


def _remarks(outcome: scenarios.ScenarioResult) -> None:
    for reason, times in outcome.losses.items():
        progress(f"  lost: {times} x {reason}")
    for what in (*outcome.processes_left, *outcome.shared_memory_left, *outcome.files_left, *outcome.entries_left):
        progress(f"  left: {what}")


def _row(
    scenario: scenarios.Scenario, kind: str, title: str, outcomes: list[scenarios.ScenarioResult]
) -> tuple[list[str], dict[str, Any]]:
    values = {
        key: median(getattr(outcome, key) for outcome in outcomes)
        for key in ("leave", "frontend", "exited", "gone", "gone_after_leaving", "after_last_answer")
    }
    never = f"not in {scenario.bound:.0f} s"
    codes = sorted({"-" if outcome.code is None else str(outcome.code) for outcome in outcomes})
    missed = sorted({name for outcome in outcomes for name in outcome.missed(scenario)}) if kind == OURS else []
    streams = sum(outcome.streams for outcome in outcomes)
    completed = sum(outcome.completed for outcome in outcomes)
    left = [
        max(len(getattr(outcome, key)) for outcome in outcomes)
        for key in ("processes_left", "shared_memory_left", "files_left", "entries_left")
    ]
    row = [
        f"{scenario.name}{' +g' if scenario.after_grace else ''}: {title}",
        (seconds(values["leave"]) if values["leave"] is not None else never) if scenario.ready else "-",
        seconds(values["frontend"]),
        seconds(values["exited"]) if values["exited"] is not None else never,
        seconds(values["gone"]) if values["gone"] is not None else never,
        seconds(values["gone_after_leaving"]),
        seconds(values["after_last_answer"]),
        "/".join(codes),
        f"{completed}/{streams}" if streams else "-",
        "/".join(map(str, left)),
        "" if kind != OURS else "ok" if not missed else "MISSED " + ", ".join(missed),
    ]
    result = {
        "scenario": scenario.name,
        "worker": kind,
        "medians": values,
        "missed": missed,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    return row, result
