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
import re
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
from common.subjects import OURS, PEER, RealEngine
from common.workbench import Workbench, WorkbenchError, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

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
TOPOLOGY = {"zone": "zone-a", "rack": "rack-7"}
#: Values that differ from run to run.
_LOCAL = re.compile(r"(/|hf://|file://)\S*/model\b|\b\d+\.\d+\.\d+\.\d+\b|blake3:\w+")
_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? \S+")
_LABEL = re.compile(r'([A-Za-z_]\w*)="(?:[^"\\]|\\.)*"')


def series(text: str) -> dict[str, list[str]]:
    """Return the labels of each series in an exposition, by the series' name."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            found.setdefault(match[1], set()).update(_LABEL.findall(match[2] or ""))
    return {name: sorted(labels) for name, labels in sorted(found.items())}


def card(discovery: Path, instance: str) -> dict[str, Any]:
    """Return the model card of an instance, without what differs from run to run."""
    (entry,) = [path for path in (discovery / "v1" / "mdc").iterdir() if instance in path.name]
    content = json.loads(entry.read_text(encoding="utf-8"))
    return plain(content.get("card_json", content))


def plain(value: Any) -> Any:
    """Return a value of a card with a placeholder for each path, address and checksum."""
    if isinstance(value, dict):
        return {key: "LOCAL" if key.endswith("_port") else plain(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return _LOCAL.sub("LOCAL", value) if isinstance(value, str) else value


def differences(recorded: Any, found: Any, where: str = "") -> Iterator[str]:
    """Yield one line for each difference between two cards."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in sorted(recorded.keys() | found.keys()):
            yield from differences(recorded.get(key), found.get(key), f"{where}.{key}".lstrip("."))
    elif recorded != found:
        yield f"{where}: recorded {json.dumps(recorded)}, found {json.dumps(found)}"


def record(engine: RealEngine, kind: str, logs: Path | None) -> dict[str, Any]:
    """Start a worker, and return its card and its series."""
    with Workbench(engine, logs) as bench:
        topology = bench.directory / "topology"
        topology.mkdir()
        for name, value in TOPOLOGY.items():
            (topology / name).write_text(value)
        (port,) = free_ports(1)
        variables = {
            "DYN_SYSTEM_PORT": str(port),
            "DYN_TOPOLOGY_ENABLED": "true",
            "DYN_TOPOLOGY_MOUNT_PATH": str(topology),
            "DYN_KV_TRANSFER_DOMAIN": "zone",
            "DYN_KV_TRANSFER_ENFORCEMENT": "preferred",
            "DYN_KV_TRANSFER_PREFERRED_WEIGHT": "0.85",
        }
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
    lines = [f"card {line}" for line in differences(recorded["card"], found["card"])]
    for name in sorted(recorded["series"].keys() | found["series"].keys()):
        missing = set(recorded["series"].get(name, ())) - set(found["series"].get(name, ()))
        if name not in found["series"]:
            lines.append(f"series {name}: only in the record")
        elif name not in recorded["series"]:
            lines.append(f"series {name}: not in the record")
        elif missing:
            lines.append(f"series {name}: lacks the labels {', '.join(sorted(missing))}")
    print("\n".join(lines) or "no differences")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
