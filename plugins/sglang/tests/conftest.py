"""A tiny random model, and an environment in which SGLang runs on two cores without a GPU."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import pytest
import torch

from dynamo_worker.testing import Cluster

pytest_plugins = ["dynamo_worker.testing.plugin"]

#: What SGLang needs on a small machine. Compiling for the first request with a penalty takes 19 s.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
FLAGS = ["--served-model-name", "tiny", "--max-total-tokens", "16384", "--max-running-requests", "16"]
if not torch.cuda.is_available():
    ENVIRONMENT |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        # The allocator of pages is a Triton kernel.
        "TRITON_INTERPRET": "1",
    }
    FLAGS += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    # Idle schedulers would keep both cores busy.
    FLAGS += ["--disable-overlap-schedule", "--sleep-on-idle"]

for _name, _value in ENVIRONMENT.items():  # for this process and for the workers it starts
    os.environ.setdefault(_name, _value)
# What SGLang and torch deprecate while they are imported is not ours to mend.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("dynamo_worker_sglang.engine")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a Llama with two layers, random weights and a byte-level tokenizer."""
    from dynamo_worker.testing.tiny_model import make

    return make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def flags(model: Path) -> list[str]:
    """Return the engine's flags for the tiny model."""
    return ["--model-path", str(model), *FLAGS]


@pytest.fixture
def engine_args(flags: list[str]) -> list[str]:
    """Return the arguments of a worker."""
    return ["--engine", "sglang", *flags]


@pytest.fixture
def cluster(cluster: Cluster) -> Cluster:
    """Return a cluster of workers that serve the tiny model."""
    cluster.model = "tiny"
    cluster.start_seconds = 120.0
    return cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let SGLang and torch warn: what they deprecate is not ours to mend."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
