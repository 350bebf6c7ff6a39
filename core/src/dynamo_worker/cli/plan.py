"""`dynamo-worker plan`: show how a shutdown would use the termination grace period."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli import output
from dynamo_worker.cli.chosen_engine import ChosenEngine
from dynamo_worker.cli.engine_parser import EngineParser, engine_parser, parse_engine_args
from dynamo_worker.supervisor.protocol import FORCED_STOP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.config.shutdown_plan import ShutdownPlan, Stage

USAGE = "dynamo-worker plan [settings flags] [--json]"

_COLOURS: Final = {
    "unregister": "blue",
    "grace": "cyan",
    "drain": "green",
    "cleanup": "yellow",
    "kill_reserve": "red",
}


def main(argv: Sequence[str]) -> int:
    """Print the timeline; the exit code is 0 even if it does not fit."""
    chosen = ChosenEngine(argv, ("--json", "-h", "--help"))
    line = chosen.line
    if line.switches & {"-h", "--help"}:
        print(
            f"usage: {USAGE}\n\nShows how a shutdown would use the termination grace period, and warns if the stages "
            "do not fit.\nReads the same flags, environment and --config file as a worker."
        )
        return 0
    settings, config = chosen.settings()
    if line.rest:
        parser = EngineParser("")
        if settings.engine:
            parser = engine_parser(chosen.plugins(settings))
        parse_engine_args(parser, line.rest, config)
    plan = settings.shutdown_plan
    if "--json" in line.switches:
        print(json.dumps(_as_json(plan, settings), indent=2))
    else:
        _draw(plan, settings)
    return 0


def _as_json(plan: ShutdownPlan, settings: WorkerSettings) -> dict[str, object]:
    return {
        "total": plan.total,
        "drain_mode": settings.drain,
        "fits": plan.fits,
        "stages": [{"name": stage.name, "start": stage.start, "end": stage.end} for stage in plan.stages()],
        "forced_stop": FORCED_STOP,
        "warnings": list(plan.warnings),
    }


def _meaning(stage: Stage, settings: WorkerSettings) -> str:
    return {
        "unregister": "every endpoint leaves discovery, at most",
        "grace": "keep serving routers that have not noticed yet",
        "drain": f"{settings.drain.summary}, at most",
        "cleanup": f"the plugins' cleanup hooks; one may take up to {settings.engine_shutdown_timeout:g} s if the "
        "drain ends early",
        "kill_reserve": "the supervisor kills remaining processes and cleans up",
    }[stage.name]


def _draw(plan: ShutdownPlan, settings: WorkerSettings) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = output.console(highlight=False, width=None if sys.stdout.isatty() else 120)
    stages = plan.stages()
    span = max(plan.total, stages[-1].end)
    room = max(20, min(60, console.width - 60))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("STAGE")
    table.add_column("FROM", justify="right")
    table.add_column("TO", justify="right")
    table.add_column("SECONDS", justify="right")
    table.add_column("0 s".ljust(room - len(f"{span:g} s")) + f"{span:g} s", width=room, no_wrap=True)
    table.add_column("WHAT HAPPENS", overflow="fold")
    for stage in stages:
        left = round(stage.start / span * room)
        length = max(round(stage.end / span * room) - left, 1 if stage.duration else 0)
        left = min(left, room - length)
        bar = f"{' ' * left}[{_COLOURS[stage.name]}]{'█' * length}[/]"
        name = stage.name.replace("_reserve", "")
        seconds = (f"{value:g}" for value in (stage.start, stage.end, stage.duration))
        table.add_row(name, *seconds, bar, escape(_meaning(stage, settings)))
    console.print(f"Shutdown within {plan.total:g} s, drain mode [bold]{settings.drain}[/]")
    console.print()
    console.print(table)
    console.print()
    console.print(f"A second signal forces the end within {FORCED_STOP:g} s; a third one kills immediately.")
    console.print("In Kubernetes, a preStop hook uses up part of this time: it runs before the first signal.")
    for warning in plan.warnings:
        console.print(f"[bold red]warning:[/] {escape(warning)}")
    if not plan.warnings:
        console.print("Everything fits.")
