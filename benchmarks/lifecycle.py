#!/usr/bin/env python3
"""The lifecycle: stops, faults and restarts of a worker, dynamo-worker against its peer.

Faults are injected with signals to real processes, and their effects are observed from outside: in the discovery
directory (inotify), the frontend's /v1/models, the processes (pidfd), and the streams of clients. A stream is
complete when its client received every token and a finish reason; dynamo-worker's streams must also have the
same text as an undisturbed stream.

Parts:
  stops      SIGTERM idle and busy, second and third signal, kill -9, engine faults
  in-flight  thousands of requests in flight when the worker is told to stop (dynamo-worker only)
  rolling    two workers under steady load, restarted in turn; counts lost requests

The peer is NVIDIA's Rust Worker (dynamo.common.backend) around a minimal Python engine. Both have the same grace
period and the same frontend, with request migration on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import in_flight, peer_environment, rolling, scenarios, stops
from common.load import LoadError
from common.processes import raise_file_limit
from common.report import add_output_arguments, machine, number, progress, seconds, table, write_json
from common.subjects import OURS, PEER, TITLES, Echo
from common.workbench import Workbench, WorkbenchError

_PARTS = ("stops", "in-flight", "rolling")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/lifecycle.py --parts stops --scenario 'worker killed' --repeat 1",
    )
    parser.add_argument(
        "--parts", default=",".join(_PARTS), metavar="LIST", help="parts to run, separated by commas (default: all)"
    )
    parser.add_argument(
        "--scenario",
        action="append",
        default=[],
        metavar="TEXT",
        help="measure only stops whose name contains this text; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios of the part `stops` and exit")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each stop (default: 3)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="streams of a busy worker (default: 8)")
    parser.add_argument(
        "--grace", type=float, default=1.0, metavar="S", help="grace period of all workers in seconds (default: 1)"
    )
    parser.add_argument(
        "--in-flight",
        default="1000,10000",
        metavar="LIST",
        help="numbers of requests in flight, separated by commas (default: 1000,10000)",
    )
    parser.add_argument(
        "--restarts", type=int, default=100, metavar="N", help="rolling restarts per drain mode (default: 100)"
    )
    parser.add_argument(
        "--peer-restarts", type=int, default=10, metavar="N", help="rolling restarts of the peer (default: 10)"
    )
    parser.add_argument(
        "--modes", default="complete,handoff", metavar="LIST", help="drain modes (default: complete,handoff)"
    )
    parser.add_argument("--no-peer", action="store_true", help="measure dynamo-worker alone")
    parser.add_argument(
        "--peer-env", type=Path, metavar="DIR", help="virtual environment of the peer; created if missing"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the rolling restarts (needs matplotlib in this environment)"
    )
    parser.add_argument(
        "--plot-from", type=Path, metavar="FILE", help="draw --plot from a file written by --json instead of measuring"
    )
    add_output_arguments(parser)
    return parser.parse_args()


def _in_flight(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    counts = [int(count) for count in arguments.in_flight.split(",")]
    frontends = in_flight.frontends_for(max(counts), raise_file_limit())
    results = []
    rows = []
    for mode in ("complete", "handoff", "abort"):
        for count in counts:
            # A fresh frontend for each: thousands of streams leave their traces in one.
            try:
                with Workbench(keep_logs=arguments.keep_logs, frontends=frontends) as bench:
                    result = in_flight.measure(bench, mode, count)
            except (WorkbenchError, LoadError) as error:
                progress(f"{mode}, {count} requests: not measured: {error}")
                rows.append([f"{mode}, {count} requests", "not measured", *[""] * 6])
                continue
            results.append({**asdict(result), "per_request": result.per_request})
            per_request = result.per_request
            rows.append(
                [
                    f"{mode}, {count} requests",
                    str(result.in_flight),
                    f"{result.completed}/{result.requests}",
                    seconds(result.leave),
                    seconds(result.gone),
                    seconds(result.work),
                    "-" if per_request is None else number(per_request * 1e6, "µs"),
                    str(result.code),
                ]
            )
            for reason, times in result.losses.items():
                progress(f"{mode}, {count} in flight: {times} x {reason}")
    table(
        "Many requests in flight at SIGTERM, dynamo-worker (complete: work counts from the last answer)",
        ["", "in flight", "completed", "out of discovery", "gone", "own work", "per request", "code"],
        rows,
    )
    return results


def _rolling(arguments: argparse.Namespace, peer: Path | None) -> list[rolling.Rolling]:
    modes: list[tuple[str, str | None, int]] = [(OURS, mode, arguments.restarts) for mode in arguments.modes.split(",")]
    if peer is not None and arguments.peer_restarts:
        modes.append((PEER, None, arguments.peer_restarts))
    series = []
    for kind, mode, restarts in modes:
        try:
            with Workbench(Echo(peer, tokens_per_second=rolling.RATE), arguments.keep_logs) as bench:
                title = f"{TITLES[kind]}, {mode}" if mode else TITLES[kind]
                grace = min(arguments.grace, 0.5)
                result = rolling.measure(bench, kind, title, mode, restarts, grace, 4 * arguments.streams)
        except (WorkbenchError, LoadError) as error:
            progress(f"{TITLES[kind]}, {mode or 'rolling'}: not measured: {error}")
            continue
        series.append(result)
        for reason, times in result.losses.items():
            progress(f"{result.title}: {times} x {reason}")
    rolling.print_table(series)
    return series


def _plot(series: list[rolling.Rolling], path: Path) -> None:
    if rolling.plot(series, path):
        progress(f"wrote {path}")
    else:
        progress("no plot: matplotlib is not installed; use --json now and --plot-from later")


def main() -> int:
    """Run the benchmark."""
    arguments = _arguments()
    try:
        if arguments.list:
            for scenario in scenarios.of_echo():
                print(scenario.name)
            return 0
        if arguments.plot_from:
            if not arguments.plot:
                raise WorkbenchError("--plot-from needs --plot FILE.png")
            content = json.loads(arguments.plot_from.read_text(encoding="utf-8"))
            _plot(rolling.load_series(content["results"].get("rolling", [])), arguments.plot)
            return 0
        parts = arguments.parts.split(",")
        unknown = sorted(set(parts) - set(_PARTS))
        if unknown:
            raise WorkbenchError(f"no such part: {', '.join(unknown)}; there are {', '.join(_PARTS)}")
        peer = None
        if not arguments.no_peer and set(parts) & {"stops", "rolling"}:
            peer = peer_environment.ensure(arguments.peer_env)
        results: dict[str, Any] = {}
        if "stops" in parts:
            stops_of = [kind for kind in (PEER, OURS) if kind == OURS or peer is not None]
            with Workbench(Echo(peer, tokens_per_second=scenarios.RATE), arguments.keep_logs) as bench:
                chosen = scenarios.chosen(scenarios.of_echo(), arguments.scenario)
                results["stops"] = stops.measure(bench, chosen, stops_of, TITLES, arguments)
        if "in-flight" in parts:
            results["in_flight"] = _in_flight(arguments)
        if "rolling" in parts:
            series = _rolling(arguments, peer)
            results["rolling"] = [entry.as_json() for entry in series]
            if arguments.plot:
                _plot(series, arguments.plot)
    except (peer_environment.PeerEnvironmentError, WorkbenchError, LoadError, OSError) as error:
        print(f"lifecycle.py: {error}", file=sys.stderr)
        return 1
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, "lifecycle", vars(arguments), results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
