"""vLLM with a tiny model, in an environment in which it runs on two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_worker.supervisor import gpu
from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_A_MOMENT, OF_THE_WORKER

#: What vLLM needs on a small machine. Kernels that were compiled once are kept: compiling takes 20 s each time.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    # Otherwise every worker binds itself to the same first core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHINDUCTOR_CACHE_DIR": str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo-worker-tests" / "torchinductor"
    ),
}
#: Tests in which each worker takes half a minute to start, and what shows the same in every run.
SLOW = {
    *OF_THE_WORKER,
    *OF_A_MOMENT,
    "test_all_is_on_loopback_with_a_frontend_there[kv]",  # a worker of two ranks is
    # TensorRT-LLM's stand-in; what is vLLM's own of it, in `test_leases.py`.
    "test_prefill_here_and_decode_there",
}
#: float32: vLLM's AMX kernels for bfloat16 end with SIGILL on virtual machines that advertise AMX without allowing it.
FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32", "--served-model-name", "tiny")
#: Up to four workers share one GPU; by default each takes nearly all of it.
GPU_FLAGS = ("--gpu-memory-utilization", "0.2") if gpu.present() else ()

os.environ.update(ENVIRONMENT)  # for this process and for the workers it starts


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what others show in seconds."""
    for item in items:
        if item.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_directory_of_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the directory that an engine in this process has chosen from the workers that later tests start."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


@pytest.fixture
def subject(tiny_model: Path) -> Subject:
    return Subject(
        "vllm",
        ["--model", str(tiny_model), *FLAGS, *GPU_FLAGS],
        model="tiny",
        start_seconds=180.0,
        processes={"core": r"VLLM::EngineCore", "worker": r"VLLM::Worker"},
        stream_tokens=1500,
        start_stages=(
            r"EngineCore pid=\d+\).* Initializing a V1 LLM engine",
            r"Worker pid=\d+\).* Starting to load",
        ),
        stall_timeout=10.0,
    )
