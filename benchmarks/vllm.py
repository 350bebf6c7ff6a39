#!/usr/bin/env python3
"""vLLM under dynamo-worker and under NVIDIA's `dynamo.vllm`, side by side on the same vLLM.

Run it with the Python of an environment that has vLLM and dynamo-worker-vllm; the peer's packages are installed beside
it, once. The model is a Llama with two layers and random weights, made here.

Parts:
  start    from the start of the program to the model in /v1/models
  load     tokens per second, CPU time per token in the worker's main process, time to the first token
  stops    SIGTERM, kill -9 and SIGSTOP to workers and vLLM's processes, with streams in flight
  rolling  two workers under steady load, restarted in turn; lost requests counted
"""

from __future__ import annotations

from common import engine_benchmark
from common.subjects import RealEngine

VLLM = RealEngine(
    name="vllm",
    model_flag="--model",
    # float32: vLLM's AMX kernels for bfloat16 end with SIGILL on virtual machines that advertise AMX but forbid it.
    flags=("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"),
    processes={"EngineCore": "VLLM::EngineCore", "VLLM::Worker": "VLLM::Worker"},
    loading="Initializing a V1 LLM engine",
    variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Otherwise two workers on one machine bind themselves to the same core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    },
)
#: Issue 3 of the project: the most, and the least, that ours / peer may be.
BARS: engine_benchmark.Bars = {
    "ready_s": (1.0, None),
    "tokens_per_second": (None, 1.5),
    "cpu_us_per_token": (0.45, None),
    "time_to_first_token_s": (1.0, None),
}

if __name__ == "__main__":
    arguments = engine_benchmark.parse(__doc__, "python benchmarks/vllm.py --parts start,load --plot vllm.png")
    raise SystemExit(engine_benchmark.main(VLLM, BARS, arguments))
