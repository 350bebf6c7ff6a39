"""A real engine under dynamo-worker and under its peer, side by side on the same engine version."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import peer_environment, rolling, scenarios, stops
from common.load import LoadError, LoadSpecification, run
from common.peer_environment import PeerEnvironmentError
from common.processes import cpu_seconds
from common.report import (
    add_output_arguments,
    bar,
    machine,
    median,
    number,
    progress,
    seconds,
    spread,
    table,
    write_json,
)
from common.subjects import OURS, PEER, RealEngine
from common.workbench import Workbench, WorkbenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.workbench import Worker

PARTS = ("start", "load", "stops", "rolling")
#: What a load measures, its unit, and the bar on ours / peer.
Bars = dict[str, tuple[float | None, float | None]]
_COLUMNS: dict[str, tuple[str, Callable[[Sequence[float]], str]]] = {
    "tokens_per_second": ("tokens/s", spread),
    "cpu_us_per_token": ("CPU/token of the main process", lambda values: spread(values, "µs")),
    "time_to_first_token_s": ("first token", lambda values: spread([value * 1e3 for value in values], "ms")),
    "merged_chunks": ("chunks with several tokens", spread),
    "lost": ("requests lost", lambda values: number(sum(values))),
}


def parser(doc: str | None, example: str) -> argparse.ArgumentParser:
    """Return the command line that all engines' benchmarks share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"example: {example}"
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="LIST", help="parts to run, separated by commas (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="number of rounds; medians are shown (default: 3)"
    )
    parser.add_argument(
        "--load-streams", type=int, default=32, metavar="N", help="concurrent streams of the load (default: 32)"
    )
    parser.add_argument(
        "--requests", type=int, default=128, metavar="N", help="total requests of the load (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="tokens per request (default: %(default)s)"
    )
    parser.add_argument(
        "--scenario",
        action="append",
        default=[],
        metavar="TEXT",
        help="measure only stops whose name contains this text; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios of the part `stops` and exit")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each stop (default: 1)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="streams of a busy worker (default: 8)")
    parser.add_argument("--grace", type=float, default=1.0, metavar="S", help="grace period in seconds (default: 1)")
    parser.add_argument(
        "--bounds", default="10,30", metavar="LIST", help="stall timeouts to show, in seconds (default: 10,30)"
    )
    parser.add_argument("--restarts", type=int, default=10, metavar="N", help="rolling restarts (default: 10)")
    parser.add_argument(
        "--modes", default="complete", metavar="LIST", help="drain modes of the rolling restarts (default: complete)"
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--no-peer", action="store_true", help="measure dynamo-worker alone")
    alone.add_argument("--no-ours", action="store_true", help="measure the peer alone")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    add_output_arguments(parser)
    return parser


def main(engine: RealEngine, bars: Bars, arguments: argparse.Namespace) -> int:
    """Run the parts that were asked for; return the exit code.

    :param bars: for each measured value the most and the least that ours / peer may be.
    """
    bounds = [float(bound) for bound in arguments.bounds.split(",")]
    if arguments.list:
        for scenario in scenarios.of_real(engine, bounds):
            print(scenario.name)
        return 0
    try:
        parts = arguments.parts.split(",")
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise WorkbenchError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
        if not arguments.no_peer:
            packages = peer_environment.ensure_packages(f"dynamo.{engine.name}", engine.variables)
            engine = replace(engine, peer_packages=packages)
        kinds = [OURS] if arguments.no_peer else [PEER] if arguments.no_ours else [PEER, OURS]
        results: dict[str, Any] = {}
        if "start" in parts or "load" in parts:
            results |= _start_and_load(engine, kinds, parts, arguments)
            results["ratios"] = [
                ratio for setting in engine.settings for ratio in _report(engine, kinds, bars, results, setting)
            ]
        if "stops" in parts:
            with Workbench(engine, arguments.keep_logs) as bench:
                chosen = scenarios.chosen(scenarios.of_real(engine, bounds), arguments.scenario)
                results["stops"] = stops.measure(bench, chosen, kinds, engine.titles, arguments)
        if "rolling" in parts:
            results["rolling"] = _rolling(engine, kinds, arguments)
        if arguments.plot and "ratios" in results:
            progress(
                f"wrote {arguments.plot}"
                if _plot(engine, results, arguments.plot)
                else "no plot: matplotlib is not installed"
            )
    except (PeerEnvironmentError, WorkbenchError, LoadError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, engine.name, vars(arguments), results)
    return 0


def _start_and_load(
    engine: RealEngine, kinds: Sequence[str], parts: Sequence[str], arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Start every worker once unmeasured, to fill compile caches, then in rounds; load them in between."""
    results: dict[str, list[dict[str, Any]]] = {"start": [], "load": []}
    with Workbench(engine, arguments.keep_logs) as bench:
        for kind in kinds:
            progress(f"{engine.titles[kind]}: first start, unmeasured, fills the compile caches")
            worker = bench.start(kind, f"{kind}-first")
            _load(bench, worker, arguments, arguments.load_streams)
            bench.end([worker])
        for round_ in range(arguments.rounds):
            for setting, variables in engine.settings.items():
                # Another order in every round: no worker always runs behind the same one. One at a time: vLLM's
                # processes still spin for a second after a load.
                for kind in kinds if round_ % 2 else reversed(kinds):
                    where = f"round {round_ + 1} of {arguments.rounds}: {engine.titles[kind]}"
                    if setting:
                        where += f", {setting}"
                    about = {"worker": kind, "round": round_, "setting": setting}
                    began = time.monotonic()
                    worker = bench.start(kind, f"{kind}-{setting}-{round_}", additions=variables)
                    took = time.monotonic() - began
                    progress(f"{where}: ready after {took:.1f} s")
                    results["start"].append({**about, "ready_s": took})
                    if "load" in parts:
                        _load(bench, worker, arguments, arguments.load_streams)  # warms up
                        result = _load(bench, worker, arguments, arguments.requests)
                        results["load"].append({**about, **result})
                        progress(
                            f"{where}: {result['tokens_per_second']:.0f} tokens/s, "
                            f"{result['cpu_us_per_token']:.1f} µs of CPU per token, "
                            f"{result['merged_chunks']} of {result['chunks']} chunks with several tokens, "
                            f"{result['lost']} requests lost"
                        )
                    bench.end([worker])
    return results


def _load(bench: Workbench, worker: Worker, arguments: argparse.Namespace, requests: int) -> dict[str, float]:
    serving = worker.serving_pid()
    before = cpu_seconds(serving)
    result = run(
        LoadSpecification(
            bench.ports,
            worker.model,
            arguments.load_streams,
            requests,
            arguments.tokens,
            count_by_usage=True,
            timeout=180.0,
        )
    )
    cpu = cpu_seconds(serving) - before
    for reason, times in result.losses().items():
        progress(f"{worker.program.name}: {times} x {reason}")
    if not result.completed:
        raise WorkbenchError(f"{worker.program.name} has answered no request")
    return {
        "tokens_per_second": result.tokens_per_second,
        "cpu_us_per_token": cpu / result.tokens * 1e6,
        "time_to_first_token_s": result.time_to_first_token() or 0.0,
        "chunks": result.chunks,
        "merged_chunks": result.merged,
        "lost": result.lost,
    }


def _report(
    engine: RealEngine, kinds: Sequence[str], bars: Bars, results: dict[str, list[dict[str, Any]]], setting: str
) -> list[dict[str, Any]]:
    values: dict[tuple[str, str], list[float]] = {}
    for part in ("start", "load"):
        for entry in results[part]:
            if entry["setting"] != setting:
                continue
            for key, value in entry.items():
                if key not in ("worker", "round", "setting"):
                    values.setdefault((entry["worker"], key), []).append(value)
    title = f"{engine.name}, {setting}" if setting else engine.name
    table(
        f"{title}: medians (range)",
        ["", "ready after", *(title for title, _ in _COLUMNS.values())],
        [
            [
                engine.titles[kind],
                seconds(median(values.get((kind, "ready_s"), []))),
                *(show(values.get((kind, key), [])) for key, (_, show) in _COLUMNS.items()),
            ]
            for kind in kinds
        ],
    )
    ratios: list[dict[str, Any]] = []
    for key, (most, least) in bars.items():
        pairs = zip(values.get((OURS, key), []), values.get((PEER, key), []), strict=False)
        each = [ours / peer for ours, peer in pairs if peer]
        if not each:
            continue
        wanted = f"≤ {most}" if most is not None else f"≥ {least}"
        verdict = bar(median(each), most, least)
        what = f"{key}, {setting}" if setting else key
        ratios.append({"what": what, "ratios": each, "ratio": median(each), "bar": wanted, "verdict": verdict})
    if ratios:
        table(
            f"{title}: dynamo-worker / peer, medians of the rounds' ratios",
            ["", "ratio", "range", "bar", ""],
            [
                [
                    ratio["what"],
                    number(ratio["ratio"]),
                    f"{number(min(ratio['ratios']))}…{number(max(ratio['ratios']))}",
                    ratio["bar"],
                    ratio["verdict"],
                ]
                for ratio in ratios
            ],
        )
    return ratios


def _rolling(engine: RealEngine, kinds: Sequence[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    series = []
    runs: list[tuple[str, str | None]] = []
    if OURS in kinds:
        runs += [(OURS, mode) for mode in arguments.modes.split(",")]
    if PEER in kinds:
        runs.append((PEER, None))
    for kind, mode in runs:
        title = f"{engine.titles[kind]}, {mode}" if mode else engine.titles[kind]
        with Workbench(engine, arguments.keep_logs) as bench:
            result = rolling.measure(
                bench,
                kind,
                title,
                mode,
                arguments.restarts,
                arguments.grace,
                arguments.streams,
                tokens=arguments.tokens,
                request_seconds=2.0,
            )
        for reason, times in result.losses.items():
            progress(f"{title}: {times} x {reason}")
        series.append(result)
    rolling.print_table(series)
    return [entry.as_json() for entry in series]


def _plot(engine: RealEngine, results: dict[str, Any], path: Path) -> bool:
    """Draw the ratios to the peer; return False where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    ratios = results["ratios"]
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(ratios) + 1.4))
    for row, ratio in enumerate(ratios):
        color = "#2ca02c" if ratio["verdict"] == "ok" else "#d62728"
        axis.barh(row, ratio["ratio"], color=color, height=0.5)
        axis.plot(ratio["ratios"], [row] * len(ratio["ratios"]), "k.", markersize=5)
        axis.text(0.02, row + 0.36, f"{ratio['what']}: {ratio['ratio']:.2f} (bar {ratio['bar']})", fontsize=9)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks([])
    axis.set_ylim(-0.5, len(ratios) - 0.2)
    axis.set_xlabel(f"dynamo-worker / {engine.titles[PEER]}; dots: single rounds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
