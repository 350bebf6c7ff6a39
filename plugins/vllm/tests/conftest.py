"""A tiny random model, and an environment in which vLLM runs on two cores."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import pytest

from dynamo_worker.supervisor import gpu
from dynamo_worker.testing import Cluster

pytest_plugins = ["dynamo_worker.testing.plugin"]

#: What vLLM needs on a small machine. Kernels that were compiled once are kept: compiling takes 20 s each time.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    # Otherwise every worker binds itself to the same first core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).parent / "few_cores"), os.environ.get("PYTHONPATH")))
    ),
    "TORCHINDUCTOR_CACHE_DIR": str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo-worker-tests" / "torchinductor"
    ),
}
#: float32: vLLM's AMX kernels for bfloat16 end with SIGILL on virtual machines that advertise AMX without allowing it.
FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32", "--served-model-name", "tiny")
#: Up to four workers share one GPU; by default each takes nearly all of it.
GPU_FLAGS = ("--gpu-memory-utilization", "0.2") if gpu.present() else ()


os.environ.update(ENVIRONMENT)  # for this process and for the workers it starts
# What vLLM and torch deprecate while they are imported is not ours to mend.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("dynamo_worker_vllm.engine")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a Llama with two layers, random weights and a byte-level tokenizer."""
    from dynamo_worker.testing.tiny_model import make

    return make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def flags(model: Path) -> list[str]:
    """Return the engine's flags for the tiny model."""
    return ["--model", str(model), *FLAGS, *GPU_FLAGS]


@pytest.fixture
def engine_args(flags: list[str]) -> list[str]:
    """Return the arguments of a worker."""
    return ["--engine", "vllm", *flags]


@pytest.fixture
def cluster(cluster: Cluster) -> Cluster:
    """Return a cluster of workers that serve the tiny model."""
    cluster.model = "tiny"
    cluster.start_seconds = 180.0
    return cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let vLLM and torch warn: what they deprecate is not ours to mend."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
