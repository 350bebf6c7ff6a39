#!/usr/bin/env python3
"""The cost of the flight record: CPU and memory of supervisor and guardian, and the request path, with and without it.

Two workers with the echo engine run side by side behind one frontend, one of them with ``--record-keep 0``. In each
round both are left alone for a while, then loaded one after the other, in another order each round:

  idle    CPU of supervisor and guardian together, as a share of one core; their memory (PSS) and what is on disk
  loaded  the worker's CPU per token, and the CPU of supervisor and guardian for each second of the load

Ratios and differences are computed within a round; the tables show their medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from common.load import LoadError, LoadSpecification, run
from common.processes import cpu_seconds, pss_bytes
from common.report import (
    add_output_arguments,
    bar,
    machine,
    median,
    number,
    progress,
    spread,
    table,
    write_json,
)
from common.subjects import OURS, Echo
from common.workbench import Workbench, WorkbenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.workbench import Worker

#: The workers: name and further flags.
SUBJECTS = {"recorded": (), "unrecorded": ("--record-keep", "0")}

#: Bars of the issue: share of one core, bytes, and the worker's CPU per token against that without a record.
MOST_CPU, MOST_BYTES, MOST_RATIO = 0.01, 5 << 20, 1.02


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/recorder.py --rounds 5 --json recorder.json",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="number of rounds; medians are shown (default: 5)"
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="how long both are left alone in a round (default: 30)"
    )
    parser.add_argument(
        "--streams", type=int, default=32, metavar="N", help="concurrent streams of the load (default: 32)"
    )
    parser.add_argument("--max-tokens", type=int, default=500, metavar="N", help="tokens per request (default: 500)")
    add_output_arguments(parser)
    return parser.parse_args()


def _cpu(worker: Worker) -> float:
    return sum(cpu_seconds(pid) for pid in worker.supervisor_pids())


def _idle(workers: dict[str, Worker], seconds: float) -> dict[str, dict[str, float]]:
    before = {name: _cpu(worker) for name, worker in workers.items()}
    started = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    return {
        name: {
            "cpu_share": (_cpu(worker) - before[name]) / elapsed,
            "memory": sum(pss_bytes(pid) for pid in worker.supervisor_pids()),
        }
        for name, worker in workers.items()
    }


def _loaded(bench: Workbench, worker: Worker, streams: int, max_tokens: int) -> dict[str, float]:
    specification = LoadSpecification(
        bench.ports, worker.model, streams, 10 * streams, max_tokens, timeout=120.0, time_limit=180.0,
        count_by_usage=True,
    )  # fmt: skip
    serving, above = cpu_seconds(worker.serving_pid()), _cpu(worker)
    result = run(specification)
    serving, above = cpu_seconds(worker.serving_pid()) - serving, _cpu(worker) - above
    if result.lost:
        raise WorkbenchError(f"{worker.model} lost {result.lost} of {len(result.records)}: {result.losses()}")
    return {
        "worker_cpu_us_per_token": serving / result.tokens * 1e6,
        "supervisor_cpu_share": above / result.elapsed,
        "tokens_per_second": result.tokens_per_second,
    }


def _report(rounds: list[dict[str, dict[str, float]]], on_disk: int) -> list[dict[str, Any]]:
    def values(name: str, key: str) -> list[float]:
        return [found[name][key] for found in rounds]

    columns: dict[str, tuple[str, Callable[[Sequence[float]], str]]] = {
        "cpu_share": ("idle: CPU of supervisor and guardian", lambda them: spread([100 * it for it in them], "%")),
        "memory": ("their memory", lambda them: spread([it / (1 << 20) for it in them], "MiB")),
        "supervisor_cpu_share": ("loaded: their CPU", lambda them: spread([100 * it for it in them], "%")),
        "worker_cpu_us_per_token": ("worker CPU/token", lambda them: spread(them, "µs")),
        "tokens_per_second": ("tokens/s", spread),
    }
    table(
        f"Medians (range) of {len(rounds)} rounds",
        ["", *(title for title, _ in columns.values())],
        [[name, *(shown(values(name, key)) for key, (_, shown) in columns.items())] for name in SUBJECTS],
    )

    def pairs(key: str) -> list[tuple[float, float]]:
        return [(found["recorded"][key], found["unrecorded"][key]) for found in rounds]

    def more(key: str) -> float | None:
        return median(with_ - without for with_, without in pairs(key))

    ratio = median(with_ / without for with_, without in pairs("worker_cpu_us_per_token"))
    found: list[dict[str, Any]] = [
        {"what": "more CPU while idle, share of a core", "value": more("cpu_share"), "most": MOST_CPU},
        {"what": "more CPU under load, share of a core", "value": more("supervisor_cpu_share"), "most": MOST_CPU},
        {"what": "more memory, bytes", "value": more("memory"), "most": MOST_BYTES},
        {"what": "worker CPU per token, with / without", "value": ratio, "most": MOST_RATIO},
        {"what": "bytes on disk", "value": on_disk, "most": 192 * 1024 + 4096},
    ]
    table(
        "Cost of the flight record",
        ["", "value", "bar", ""],
        [[it["what"], number(it["value"]), f"≤ {it['most']}", bar(it["value"], it["most"])] for it in found],
    )
    return found


def main() -> int:
    """Run the benchmark."""
    arguments = _arguments()
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        with Workbench(Echo(), arguments.keep_logs) as bench:
            records = bench.directory / "records"
            additions = {"DYN_WORKER_RECORD_DIR": str(records)}
            workers = {name: bench.start(OURS, name, flags, additions) for name, flags in SUBJECTS.items()}
            for worker in workers.values():
                progress(f"warming up {worker.model}")
                _loaded(bench, worker, arguments.streams, arguments.max_tokens)
            names = list(SUBJECTS)
            for index in range(arguments.rounds):
                progress(f"round {index + 1} of {arguments.rounds}: both idle for {arguments.seconds:g} s")
                found = _idle(workers, arguments.seconds)
                for name in names if index % 2 else reversed(names):
                    found[name] |= _loaded(bench, workers[name], arguments.streams, arguments.max_tokens)
                    progress(f"  {name}: {found[name]['worker_cpu_us_per_token']:.2f} µs of CPU per token")
                rounds.append(found)
            (record,) = records.glob("dw-*.jsonl")
            on_disk = record.stat().st_size
    except (WorkbenchError, LoadError) as error:
        print(f"recorder.py: {error}", file=sys.stderr)
        return 1
    cost = _report(rounds, on_disk)
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, "recorder", vars(arguments), {"rounds": rounds, "cost": cost})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
