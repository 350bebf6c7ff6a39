#!/usr/bin/env python3
"""What NVIDIA's worker registers and measures: its model card and its metric series, on the same engine as ours.

Run it in an environment with the engine and its plugin. It installs the peer's packages into a separate directory
once, starts a worker with a tiny model behind a frontend, sends it a request, and reads its model card and its
`/metrics`. Without `--write` it compares them with the record in the plugin's tests and prints the differences. With
`--worker ours` it does the same with dynamo-worker: the differences are those between the two workers.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang import SGLANG
from vllm import VLLM

from common import peer_environment
from common.report import progress
from common.subjects import OURS, PEER
from common.workbench import Workbench, WorkbenchError, free_ports
from dynamo_worker.testing.peer_record import card, card_differences, missing_series, series, topology_variables

if TYPE_CHECKING:
    from common.subjects import RealEngine

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"vllm": VLLM, "sglang": SGLANG}
#: Flags beside those of the benchmarks, the same for both workers: they fill fields of the card, or make series appear.
FLAGS = {
    "vllm": ("--stream-interval", "2", "--dtype", "float32", "--reasoning-parser", "qwen3"),
    "sglang": ("--enable-metrics", "--reasoning-parser", "qwen3"),
}
COMMON_FLAGS = (
    *("--dyn-tool-call-parser", "hermes", "--dyn-reasoning-parser", "qwen3", "--dyn-default-thinking-mode", "disabled"),
    *("--dyn-enable-structural-tag", "--router-mode", "kv"),
)
MODEL = "tiny"


def record(engine: RealEngine, kind: str, logs: Path | None) -> dict[str, Any]:
    """Start a worker, and return its card and its series."""
    with Workbench(engine, logs) as bench:
        (port,) = free_ports(1)
        variables = {"DYN_SYSTEM_PORT": str(port), **topology_variables(bench.directory / "topology")}
        flags = [*FLAGS[engine.name], *COMMON_FLAGS]
        worker = bench.start(kind, MODEL, flags, variables)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{bench.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
            text = response.read().decode()
        return {"card": card(bench.directory / "kv", worker.instance), "series": series(text)}


def main() -> int:
    """Run what the command line asks for; return the exit code: 1 if there are differences."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/peer_record.py vllm --write",
    )
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("--worker", choices=(PEER, OURS), default=PEER, help="which worker to start (default: peer)")
    parser.add_argument("--write", action="store_true", help="write the record instead of comparing with it")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="where to keep the logs of what was started")
    arguments = parser.parse_args()
    if arguments.write and arguments.worker != PEER:
        parser.error("--write is for the peer's record")
    engine = ENGINES[arguments.engine]
    path = ROOT / "plugins" / engine.name / "tests" / "data" / "peer_record.json"
    try:
        if arguments.worker == PEER:
            packages = peer_environment.ensure_packages(f"dynamo.{engine.name}", engine.variables)
            engine = replace(engine, peer_packages=packages)
        found = record(engine, arguments.worker, arguments.keep_logs)
    except (peer_environment.PeerEnvironmentError, WorkbenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.write:
        about = {
            "peer": f"dynamo.{engine.name} {peer_environment.PEER_VERSION}",
            "runtime": version("ai-dynamo-runtime"),
            "written_by": f"python benchmarks/peer_record.py {engine.name} --write",
            "flags": [*FLAGS[engine.name], *COMMON_FLAGS],
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
        progress(f"written: {path}")
        return 0
    recorded = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"card {where}: recorded {json.dumps(before)}, found {json.dumps(now)}"
        for where, before, now in card_differences(recorded["card"], found["card"])
    ]
    missing = missing_series(recorded["series"], found["series"])
    lines += [f"series {name}: missing, or lacks the labels {labels}" for name, labels in missing.items()]
    lines += [f"series {name}: not in the record" for name in sorted(found["series"].keys() - recorded["series"])]
    print("\n".join(lines) or "no differences")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
