"""SGLang with a tiny model, in an environment in which it runs on two cores without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_A_MOMENT, OF_THE_WORKER

#: What SGLang needs on a small machine. Compiling for the first request with a penalty takes 19 s.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
FLAGS = ["--served-model-name", "tiny", "--max-total-tokens", "16384", "--max-running-requests", "16"]
#: Tests in which each worker takes half a minute to start, and what shows the same in every run.
SLOW = {
    *OF_THE_WORKER,
    *OF_A_MOMENT,
    "test_standing_still_at_work[short]",  # vLLM
    "test_all_is_on_loopback_with_a_frontend_there[kv]",  # vLLM with two ranks
}
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what others show in seconds."""
    for item in items:
        if item.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def subject(tiny_model: Path) -> Subject:
    return Subject(
        "sglang",
        ["--model-path", str(tiny_model), *FLAGS],
        model="tiny",
        start_seconds=120.0,
        processes={"scheduler": r"sglang::scheduler"},
        stream_tokens=1500,
        start_stages=(r"Load weight begin",),
        stall_timeout=10.0,
    )
