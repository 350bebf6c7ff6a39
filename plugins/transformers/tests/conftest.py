"""transformers with a tiny model, in an environment in which it runs on two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_A_MOMENT, OF_THE_WORKER

#: For this process and for the workers it starts.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
#: A cache of 8,192 tokens: several workers share one machine.
FLAGS = ("--served-model-name", "tiny", "--page-size", "32", "--num-blocks", "256", "--max-model-len", "2048")

#: Rows of the fault table that others show; and a router of KV events, of which this engine has none.
SLOW = {*OF_THE_WORKER, *OF_A_MOMENT, "test_all_is_on_loopback_with_a_frontend_there[kv]"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what others show in seconds."""
    for item in items:
        if item.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def subject(tiny_model: Path) -> Subject:
    return Subject(
        "transformers",
        ["--model", str(tiny_model), *FLAGS],
        model="tiny",
        start_seconds=90.0,
        processes={"core": r"dynamo_worker_transformers\.core:Core"},
        stream_tokens=800,
        start_stages=("Loading the model", "Model loaded"),
        stall_timeout=8.0,
    )
