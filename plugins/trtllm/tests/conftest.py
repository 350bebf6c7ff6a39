"""TensorRT-LLM with a tiny model, or its stand-in, on a machine with two cores and no GPU."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from dynamo_worker.testing import Subject

#: Whether `tensorrt_llm` is the stand-in of this folder (`standin/README.md`), whose processes are real ones.
STANDIN = "standin" in importlib.metadata.version("tensorrt_llm")

#: The stand-in's own tests.
collect_ignore = [] if STANDIN else ["test_standin_processes.py", "test_standin_surface.py"]
#: Patterns of the command lines of a rank, and of Open MPI's daemon that has started it.
RANK, DAEMON = r"mpi4py\.futures|FlashInfer|TRTLLM:", r"^orted "

for _name, _value in {"HF_HUB_OFFLINE": "1"}.items():  # for this process and for the workers it starts
    os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the conformance tests last: once a rank has died in one, Open MPI keeps a core of this process busy."""
    items.sort(key=lambda item: item.path.name == "test_conformance.py")


@pytest.fixture
def subject(tiny_model: Path) -> Subject:
    return Subject(
        "trtllm",
        ["--model-path", str(tiny_model), "--served-model-name", "tiny", "--max-batch-size", "64"],
        model="tiny",
        start_seconds=60.0 if STANDIN else 300.0,
        processes={"rank": RANK},
        stream_tokens=800 if STANDIN else 1500,
        start_stages=(r"Starting TensorRT-LLM",),
        stall_timeout=5.0 if STANDIN else 15.0,
    )


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End this process as a worker ends: at exit, TensorRT-LLM and MPI wait for ranks that tests have killed."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if "tensorrt_llm" in sys.modules and reporter is not None and hasattr(reporter, "_session"):
        code = int(reporter._session.exitstatus)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
