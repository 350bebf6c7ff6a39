"""The real engines, with the flags and variables with which both kinds of worker run them on a small machine."""

from __future__ import annotations

from common.subjects import RealEngine

VLLM = RealEngine(
    name="vllm",
    model_flag="--model",
    flags=("--enforce-eager", "--max-model-len", "2048"),
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
SGLANG = RealEngine(
    name="sglang",
    model_flag="--model-path",
    flags=(
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--disable-overlap-schedule", "--max-total-tokens", "32768", "--max-running-requests", "64"),
    ),
    processes={"scheduler": "sglang::scheduler"},
    # dynamo-worker has none.
    peer_processes={"detokenizer": "sglang::detokenizer"},
    # Both workers say so of models that they do not import on a CPU.
    loading="when loading sglang.srt.models",
    variables={
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
    },
)
