#!/usr/bin/env python3
"""The request path: tokens per second and CPU time per token of dynamo-worker, its peer and a bare handler.

Three workers serve the same tiny model behind the same frontend. They run at the same time, and each round loads
them one after another:

  peer   NVIDIA's Rust Worker (dynamo.common.backend) driving a minimal Python engine, one token per chunk
  bare   a push handler directly on ai-dynamo-runtime, without any bookkeeping: the lower bound
  ours   dynamo-worker --engine echo, with supervisor, monitors and all bookkeeping
  before another version of dynamo-worker, with `--before DIR`, to measure the cost of a change

CPU time per token is the user and system time of the process that serves requests, divided by the number of tokens
that clients received. Ratios are computed within a round; the table shows their medians.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import peer_environment
from common.load import LoadError, LoadSpecification, run
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
from common.subjects import BARE, BEFORE, OURS, PEER, TITLES, Echo
from common.workbench import Workbench, WorkbenchError, Worker


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/request_path.py --rounds 3 --streams 32 --json request_path.json",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="number of rounds; medians are shown (default: 5)"
    )
    parser.add_argument(
        "--streams",
        default="1,32,1000",
        metavar="LIST",
        help="numbers of concurrent streams, separated by commas (default: 1,32,1000)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="factor on the number of requests (default: 1)"
    )
    parser.add_argument("--max-tokens", type=int, default=500, metavar="N", help="tokens per request (default: 500)")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="X",
        help="tokens per second of each stream (default: unlimited); 30 is typical of a large model",
    )
    parser.add_argument(
        "--workers",
        default="peer,bare,ours",
        metavar="LIST",
        help="workers to measure, separated by commas (default: peer,bare,ours)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="DIR",
        help="checkout of another version to measure as well, run in this environment (`git worktree add DIR COMMIT`)",
    )
    parser.add_argument(
        "--worker-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="additional flag for dynamo-worker, such as --worker-flag=--no-warmup; may be repeated",
    )
    parser.add_argument(
        "--peer-env", type=Path, metavar="DIR", help="virtual environment of the peer; created if missing"
    )
    add_output_arguments(parser)
    return parser.parse_args()


def _specification(
    ports: tuple[int, ...], model: str, streams: int, max_tokens: int, scale: float
) -> LoadSpecification:
    rounds_of_requests = 10 if streams < 500 else 1
    requests = max(streams, round(streams * rounds_of_requests * scale))
    return LoadSpecification(
        ports, model, streams, requests, max_tokens, timeout=120.0, time_limit=180.0, count_by_usage=True
    )


def _measure(bench: Workbench, worker: Worker, streams: int, max_tokens: int, scale: float) -> dict[str, Any]:
    specification = _specification(bench.ports, worker.model, streams, max_tokens, scale)
    serving = worker.serving_pid()
    before = cpu_seconds(serving)
    supervisors = {pid: cpu_seconds(pid) for pid in worker.supervisor_pids()}
    frontend = cpu_seconds(bench.frontends[0].pid)
    result = run(specification)
    cpu = cpu_seconds(serving) - before
    frontend = cpu_seconds(bench.frontends[0].pid) - frontend
    if result.lost:
        raise WorkbenchError(f"{TITLES[worker.kind]} lost {result.lost} of {len(result.records)}: {result.losses()}")
    tokens = result.tokens
    return {
        "worker": worker.kind,
        "streams": streams,
        "requests": len(result.records),
        "tokens": tokens,
        "elapsed_s": result.elapsed,
        "tokens_per_second": result.tokens_per_second,
        "worker_cpu_us_per_token": cpu / tokens * 1e6,
        "supervisor_cpu_us_per_token": sum(cpu_seconds(pid) - at for pid, at in supervisors.items()) / tokens * 1e6,
        "frontend_cpu_us_per_token": frontend / tokens * 1e6,
        "client_cpu_us_per_token": result.client_cpu / tokens * 1e6,
        "time_to_first_token_s": result.time_to_first_token(),
    }


def _report(kinds: list[str], streams: list[int], rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    by_round = [{(run["worker"], run["streams"]): run for run in runs} for runs in rounds]

    def values(kind: str, count: int, key: str) -> list[float]:
        return [runs[kind, count][key] for runs in by_round if (kind, count) in runs]

    rows = [
        [
            f"{count} streams, {TITLES[kind]}",
            spread(values(kind, count, "tokens_per_second")),
            spread(values(kind, count, "worker_cpu_us_per_token"), "µs"),
            number(median(values(kind, count, "supervisor_cpu_us_per_token")), "µs"),
            number(median(values(kind, count, "frontend_cpu_us_per_token")), "µs"),
            number(median(values(kind, count, "client_cpu_us_per_token")), "µs"),
            seconds(median(values(kind, count, "time_to_first_token_s"))),
        ]
        for count in streams
        for kind in kinds
    ]
    table(
        f"Request path, medians (range) of {len(rounds)} rounds",
        ["", "tokens/s", "worker CPU/token", "supervisor", "frontend ", "client", "first token"],
        rows,
    )
    ratios = []
    for count in streams:
        for other, most in ((PEER, 0.2), (BARE, 1.25), (BEFORE, 1.02)):
            if OURS in kinds and other in kinds:
                ratios.append(_ratio(by_round, count, "worker_cpu_us_per_token", other, at_most=most))
        for other in (PEER, BARE, BEFORE):
            if OURS in kinds and other in kinds:
                least = 2.5 if other == PEER and count == 32 else None
                ratios.append(_ratio(by_round, count, "tokens_per_second", other, at_least=least))
        if PEER in kinds and BARE in kinds:
            # How much room the bar leaves on this machine: no worker on this runtime can be below the floor.
            ratios.append(_ratio(by_round, count, "worker_cpu_us_per_token", PEER, of=BARE))
    if not ratios:
        return ratios
    table(
        "Ratios, medians of the rounds' ratios",
        ["", "ratio", "range", "bar", ""],
        [
            [
                f"{ratio['streams']} streams, {ratio['what']}: {TITLES[ratio['worker']]} / {TITLES[ratio['other']]}",
                number(ratio["ratio"]),
                f"{number(ratio['lowest'])}…{number(ratio['highest'])}",
                ratio["bar"],
                ratio["verdict"],
            ]
            for ratio in ratios
        ],
    )
    return ratios


def _ratio(
    by_round: list[dict[tuple[str, int], dict[str, Any]]],
    streams: int,
    key: str,
    other: str,
    at_most: float | None = None,
    at_least: float | None = None,
    of: str = OURS,
) -> dict[str, Any]:
    ratios = [runs[of, streams][key] / runs[other, streams][key] for runs in by_round]
    ratio = median(ratios)
    has_bar = at_most is not None or at_least is not None
    return {
        "streams": streams,
        "worker": of,
        "what": "CPU per token" if "cpu" in key else "tokens/s",
        "other": other,
        "ratio": ratio,
        "lowest": min(ratios),
        "highest": max(ratios),
        "bar": f"≤ {at_most}" if at_most is not None else f"≥ {at_least}" if at_least is not None else "",
        "verdict": bar(ratio, at_most, at_least) if has_bar else "",
    }


def main() -> int:
    """Run the benchmark."""
    arguments = _arguments()
    kinds = [kind for kind in (PEER, BARE, OURS) if kind in arguments.workers.split(",")]
    if arguments.before is not None:
        kinds.append(BEFORE)
    streams = [int(count) for count in arguments.streams.split(",")]
    rounds: list[list[dict[str, Any]]] = []
    try:
        peer = peer_environment.ensure(arguments.peer_env) if PEER in kinds else None
        subject = Echo(peer, tokens_per_second=arguments.rate, before=arguments.before)
        with Workbench(subject, arguments.keep_logs) as bench:
            workers = []
            for kind in kinds:
                progress(f"starting {TITLES[kind]}")
                workers.append(bench.start(kind, kind, arguments.worker_flag if kind in (OURS, BEFORE) else ()))
            for worker in workers:
                progress(f"warming up {TITLES[worker.kind]}")
                _measure(bench, worker, min(32, max(streams)), arguments.max_tokens, 0.5)
            for number_ in range(arguments.rounds):
                runs: list[dict[str, Any]] = []
                for count in streams:
                    # Another order in every round: no worker always runs behind the same one.
                    for position in range(len(workers)):
                        worker = workers[(position + number_) % len(workers)]
                        result = _measure(bench, worker, count, arguments.max_tokens, arguments.scale)
                        runs.append(result)
                        progress(
                            f"round {number_ + 1} of {arguments.rounds}, {count} streams, {TITLES[worker.kind]}: "
                            f"{result['tokens_per_second']:.0f} tokens/s, "
                            f"{result['worker_cpu_us_per_token']:.1f} µs of CPU per token"
                        )
                rounds.append(runs)
    except (peer_environment.PeerEnvironmentError, WorkbenchError, LoadError) as error:
        print(f"request_path.py: {error}", file=sys.stderr)
        return 1
    ratios = _report(kinds, streams, rounds)
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, "request_path", vars(arguments), {"rounds": rounds, "ratios": ratios})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
