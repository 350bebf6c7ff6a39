#!/usr/bin/env python3
"""Embeddings on a real engine under dynamo-worker and under NVIDIA's own worker for it, side by side.

Run it in an environment with the engine and its plugin. Both workers serve the same tiny random model behind one
frontend, and are loaded in turns, in another order each round: embeddings per second, latency, and the CPU time of the
worker's main process per embedding, which is what a worker adds to its engine. The peer has an additional process for
SGLang, through which every vector goes; its CPU time is not counted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from common import embedding_load, peer_environment
from common.engines import SGLANG, VLLM
from common.peer_environment import PeerEnvironmentError
from common.processes import cpu_seconds
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
from common.subjects import OURS, PEER, RealEngine
from common.workbench import Workbench, WorkbenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.workbench import Worker

_ENGINES: Final = {
    "vllm": replace(VLLM, flags=(*VLLM.flags, "--embedding-worker", "--runner", "pooling")),
    "sglang": replace(SGLANG, flags=(*SGLANG.flags, "--embedding-worker")),
}
#: Issue 17 of the project: the least, and the most, that ours / peer may be.
_BARS: Final[dict[str, tuple[float | None, float | None]]] = {
    "embeddings_per_second": (None, 1.2),
    "cpu_us_per_embedding": (1.0, None),
    "latency_ms": (1.0, None),
}


def main() -> int:
    """Measure what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/embeddings.py vllm --inputs 1,32 --rounds 10",
    )
    parser.add_argument("engine", choices=_ENGINES, help="the engine")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="loads of each worker (default: 5)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="requests in flight (default: 16)")
    parser.add_argument("--embeddings", type=int, default=2048, metavar="N", help="of each load (default: 2048)")
    parser.add_argument(
        "--inputs", default="1,16", metavar="LIST", help="inputs of a request, one measurement each (default: 1,16)"
    )
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="of each input (default: 16)")
    parser.add_argument("--text", action="store_true", help="send words instead of token ids: the engine tokenizes")
    parser.add_argument(
        "--dtype", default="float32", help="of the model (default: float32, see benchmarks/vllm.py --help)"
    )
    add_output_arguments(parser)
    arguments = parser.parse_args()
    engine = _ENGINES[arguments.engine]
    try:
        packages = peer_environment.ensure_packages(f"dynamo.{engine.name}", engine.variables)
        engine = replace(engine, peer_packages=packages, flags=(*engine.flags, "--dtype", arguments.dtype))
        results = _measure(engine, [int(inputs) for inputs in arguments.inputs.split(",")], arguments)
    except (PeerEnvironmentError, WorkbenchError, OSError) as error:
        print(f"embeddings.py: {error}", file=sys.stderr)
        return 1
    _report(engine, results)
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, "embeddings", vars(arguments), results)
    return 0


def _measure(engine: RealEngine, sizes: Sequence[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    with Workbench(engine, arguments.keep_logs) as bench:
        workers = {}
        for kind in (PEER, OURS):
            workers[kind] = bench.start(kind, f"{kind}-embeddings")
            progress(f"{engine.titles[kind]} is ready")
            _load(bench, workers[kind], sizes[0], arguments)  # warms up
        for round_ in range(arguments.rounds):
            for inputs in sizes:
                for kind in (PEER, OURS) if round_ % 2 else (OURS, PEER):
                    result = _load(bench, workers[kind], inputs, arguments)
                    results.append({"worker": kind, "round": round_, "inputs": inputs, **result})
                    progress(
                        f"round {round_ + 1} of {arguments.rounds}, {inputs} inputs: {engine.titles[kind]}: "
                        f"{result['embeddings_per_second']:.0f} embeddings/s, "
                        f"{result['cpu_us_per_embedding']:.0f} µs of CPU each, {result['lost']} requests lost"
                    )
    return results


def _load(bench: Workbench, worker: Worker, inputs: int, arguments: argparse.Namespace) -> dict[str, float]:
    serving = worker.serving_pid()
    before = cpu_seconds(serving)
    load = embedding_load.run(
        bench.port,
        worker.model,
        clients=arguments.clients,
        requests=max(arguments.clients, arguments.embeddings // inputs),
        inputs=inputs,
        tokens=arguments.tokens,
        text=arguments.text,
        timeout=300.0,
    )
    cpu = cpu_seconds(serving) - before
    if not load.embeddings:
        raise WorkbenchError(f"{worker.program.name} has made no embedding; its log ends:\n{worker.program.log_tail()}")
    return {
        "embeddings_per_second": load.embeddings / load.seconds,
        "cpu_us_per_embedding": cpu / load.embeddings * 1e6,
        "latency_ms": (median(load.latencies) or 0.0) * 1e3,
        "lost": load.lost,
    }


def _report(engine: RealEngine, results: Sequence[dict[str, Any]]) -> None:
    for inputs in sorted({result["inputs"] for result in results}):
        values = {
            kind: {
                key: [result[key] for result in results if (result["worker"], result["inputs"]) == (kind, inputs)]
                for key in (*_BARS, "lost")
            }
            for kind in (PEER, OURS)
        }
        table(
            f"{engine.name}, {inputs} inputs a request: medians (range)",
            ["", "embeddings/s", "CPU each, main process", "latency of a request", "requests lost"],
            [
                [
                    engine.titles[kind],
                    spread(of["embeddings_per_second"]),
                    spread(of["cpu_us_per_embedding"], "µs"),
                    spread(of["latency_ms"], "ms"),
                    number(sum(of["lost"])),
                ]
                for kind, of in values.items()
            ],
        )
        rows = []
        for key, (most, least) in _BARS.items():
            each = [ours / peer for ours, peer in zip(values[OURS][key], values[PEER][key], strict=True)]
            wanted = f"≤ {most}" if most is not None else f"≥ {least}"
            rows.append([key, spread(each), wanted, bar(median(each), most, least)])
        table("dynamo-worker / peer, medians of the rounds' ratios", ["", "ratio", "bar", ""], rows)


if __name__ == "__main__":
    raise SystemExit(main())
