"""TensorRT-LLM with a tiny model, or its stand-in, on a machine with two cores and no GPU."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_THE_WORKER

#: Whether `tensorrt_llm` is the stand-in of this folder (`standin/README.md`), whose processes are real ones.
STANDIN = "standin" in importlib.metadata.version("tensorrt_llm")

#: The stand-in's own tests.
collect_ignore = [] if STANDIN else ["test_standin_processes.py", "test_standin_surface.py"]
#: Patterns of the command lines of a rank, and of Open MPI's daemon that has started it.
RANK, DAEMON = r"mpi4py\.futures|FlashInfer|TRTLLM:", r"^orted "

#: Tests that show the same with the echo engine, or with two ranks. What daemons are left when nobody cleans up is Open
#: MPI's own.
SLOW = {
    *(OF_THE_WORKER - {"test_supervisor_and_guardian_killed_at_once"}),
    "test_a_repeated_prefix_goes_to_the_worker_that_holds_it",
}
#: Of the tests of the stand-in's processes, those that every run has.
STANDINS_OWN = {"test_orderly_end", "test_death_while_busy[kill-1]", "test_errors_of_one_request", "test_launcher"}

for _name, _value in {"HF_HUB_OFFLINE": "1"}.items():  # for this process and for the workers it starts
    os.environ.setdefault(_name, _value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what others show, and run the conformance tests last.

    Once a rank has died in one of those, Open MPI keeps a core of this process busy.
    """
    for item in items:
        if item.name in SLOW or (item.path.name == "test_standin_processes.py" and item.name not in STANDINS_OWN):
            item.add_marker(pytest.mark.slow)
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
