#!/usr/bin/env python3
"""TensorRT-LLM under dynamo-worker and under NVIDIA's `dynamo.trtllm`, side by side on the same TensorRT-LLM.

Run it in an environment with TensorRT-LLM, or with the tests' stand-in for it, and dynamo-worker-trtllm. The stand-in's
processes are real ones and its tokens cost nothing, so with it the CPU time per token is that of the workers alone:
neither worker's figures say anything about TensorRT-LLM's speed. The program installs the peer's packages into a
separate directory once, and creates the model: a two-layer Llama with random weights.

Parts:
  start    time from process start until the model appears in /v1/models
  load     tokens per second, CPU time per token in the worker's main process, time to the first token
  stops    SIGTERM, kill -9 and SIGSTOP to workers, TensorRT-LLM's ranks and Open MPI's daemon, with streams in flight
  rolling  two workers under steady load, restarted in turn; counts lost requests
"""

from __future__ import annotations

from common import engine_benchmark
from common.subjects import RealEngine

TRTLLM = RealEngine(
    name="trtllm",
    model_flag="--model-path",
    flags=("--max-batch-size", "64", "--max-seq-len", "4096", "--gpus-per-node", "1"),
    processes={"rank": r".*mpi4py\.futures", "orted": "orted "},
    loading="Starting TensorRT-LLM",
    variables={"HF_HUB_OFFLINE": "1"},
)
#: The most, and the least, that ours / peer may be.
BARS: engine_benchmark.Bars = {
    "ready_s": (1.0, None),
    "tokens_per_second": (None, 1.0),
    # The larger part is TensorRT-LLM's own, in the thread that receives the ranks' messages.
    "cpu_us_per_token": (1.0, None),
    "time_to_first_token_s": (1.0, None),
}


if __name__ == "__main__":
    example = "python benchmarks/trtllm.py --parts start,load --rounds 5"
    raise SystemExit(engine_benchmark.main(TRTLLM, BARS, engine_benchmark.parser(__doc__, example).parse_args()))
