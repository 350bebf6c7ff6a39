#!/usr/bin/env python3
"""vLLM under dynamo-worker and under NVIDIA's `dynamo.vllm`, side by side on the same vLLM.

Run it in an environment with vLLM and dynamo-worker-vllm. It installs the peer's packages into a separate directory
once, and creates the model: a two-layer Llama with random weights.

Parts:
  start    time from process start until the model appears in /v1/models
  load     tokens per second, CPU time per token in the worker's main process, time to the first token
  stops    SIGTERM, kill -9 and SIGSTOP to workers and vLLM's processes, with streams in flight
  rolling  two workers under steady load, restarted in turn; counts lost requests
"""

from __future__ import annotations

from dataclasses import replace

from common import engine_benchmark
from common.engines import VLLM

#: How vLLM binds what computes to cores: as it does by default, and not at all.
BINDINGS = {"default": {"VLLM_CPU_OMP_THREADS_BIND": "auto"}, "nobind": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}}
#: Issues 3 and 9 of the project: the most, and the least, that ours / peer may be.
BARS: engine_benchmark.Bars = {
    "ready_s": (1.0, None),
    "tokens_per_second": (None, 1.0),
    "cpu_us_per_token": (0.5, None),
    "time_to_first_token_s": (1.0, None),
}


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = engine_benchmark.parser(__doc__, "python benchmarks/vllm.py --parts start,load --rounds 5")
    parser.add_argument(
        "--bindings",
        default=",".join(BINDINGS),
        metavar="LIST",
        help="thread bindings to measure: default, nobind (default: both)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="of the model (default: bfloat16; float32 on a virtual machine that advertises AMX but forbids it, where "
        "vLLM's kernels for bfloat16 end with SIGILL)",
    )
    parser.set_defaults(requests=64, tokens=500)
    arguments = parser.parse_args()
    names = arguments.bindings.split(",")
    if unknown := set(names) - BINDINGS.keys():
        parser.error(f"no such binding: {', '.join(sorted(unknown))}; there are {', '.join(BINDINGS)}")
    settings = {name: BINDINGS[name] for name in names}
    engine = replace(VLLM, flags=(*VLLM.flags, "--dtype", arguments.dtype), settings=settings)
    return engine_benchmark.main(engine, BARS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
