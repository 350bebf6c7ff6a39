#!/usr/bin/env python3
"""SGLang under dynamo-worker and under NVIDIA's `dynamo.sglang`, side by side on the same SGLang, and on its own.

Run it in an environment with SGLang and dynamo-worker-sglang. It installs the peer's packages into a separate
directory once, and creates the model: a two-layer Llama with random weights.

Parts:
  start    time from process start until the model appears in /v1/models
  load     tokens per second, CPU time per token in the worker's main process, time to the first token; and the tokens
           per second of SGLang's own Engine in a loop, without frontend and clients, before and after that
  stops    SIGTERM, kill -9 and SIGSTOP to workers and SGLang's processes, with streams in flight
  rolling  two workers under steady load, restarted in turn; counts lost requests
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common import engine_benchmark
from common.engines import SGLANG
from common.report import bar, median, number, progress, table
from common.subjects import OURS

if TYPE_CHECKING:
    import argparse

#: The most, and the least, that ours / peer may be. Issue 4 of the project only says what ours / bare may be.
BARS: engine_benchmark.Bars = {
    "ready_s": (1.0, None),
    "tokens_per_second": (None, 1.0),
    "cpu_us_per_token": (1.0, None),
    "time_to_first_token_s": (1.0, None),
}
#: The same: the least that ours / bare may be.
OURS_OF_BARE = 0.9
_BARE = Path(__file__).parent / "workers" / "bare_sglang.py"


def bare(arguments: argparse.Namespace) -> list[float]:
    """Return tokens per second of the bare engine, one number a round."""
    with tempfile.TemporaryDirectory(prefix="bare-") as directory:
        model = SGLANG.model_directory(Path(directory))
        command = [sys.executable, str(_BARE), "--model-path", str(model), *SGLANG.flags]
        for name, value in (
            ("streams", arguments.load_streams),
            ("requests", arguments.requests),
            ("tokens", arguments.tokens),
            ("rounds", arguments.rounds),
        ):
            command += [f"--bench-{name}", str(value)]
        environment = {**os.environ, **SGLANG.environment(OURS), "TMPDIR": directory}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    values: list[float] = json.loads(output.stdout.strip().splitlines()[-1])["tokens_per_second"]
    progress(f"bare engine: {', '.join(f'{value:.0f}' for value in values)} tokens/s")
    return values


def compare(arguments: argparse.Namespace, before: list[float]) -> None:
    """Print what dynamo-worker reaches of what the bare engine does."""
    whole = json.loads(arguments.json.read_text())["results"]
    alone = median([*before, *bare(arguments)])
    ours = median([entry["tokens_per_second"] for entry in whole["load"] if entry["worker"] == OURS])
    assert alone is not None
    assert ours is not None
    table(
        "tokens/s: dynamo-worker behind its frontend / bare engine, medians",
        ["dynamo-worker", "bare engine", "ratio", "bar", ""],
        [
            [
                f"{ours:.0f}",
                f"{alone:.0f}",
                number(ours / alone),
                f"≥ {OURS_OF_BARE}",
                bar(ours / alone, None, OURS_OF_BARE),
            ]
        ],
    )


if __name__ == "__main__":
    example = "python benchmarks/sglang.py --parts start,load --plot sglang.png"
    arguments = engine_benchmark.parser(__doc__, example).parse_args()
    measures = "load" in arguments.parts.split(",") and not arguments.list and not arguments.no_ours
    with tempfile.TemporaryDirectory() as directory:
        arguments.json = arguments.json or Path(directory) / "results.json"
        before = bare(arguments) if measures else []
        code = engine_benchmark.main(SGLANG, BARS, arguments)
        if measures and code == 0:
            compare(arguments, before)
    raise SystemExit(code)
