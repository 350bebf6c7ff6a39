"""The fault table on vLLM's own server behind the server engine: `-m slow`, as each start takes half a minute."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conftest import PATIENT
from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_THE_WORKER, FaultTable

if TYPE_CHECKING:
    from dynamo_worker.testing import Cluster

ROOT = Path(__file__).parents[3]
#: The Python of vLLM's environment, which `nox -s "tests(vllm)"` makes: a server need not share the worker's.
PYTHON = os.environ.get("DYNAMO_WORKER_TEST_VLLM_PYTHON") or str(ROOT / ".nox" / "tests-vllm" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason=f'no {PYTHON}: `nox -s "tests(vllm)"` installs vLLM'),
    pytest.mark.timeout(900),
]

#: What vLLM needs on a small machine; see `plugins/vllm/tests/conftest.py`.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHINDUCTOR_CACHE_DIR": str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo-worker-tests" / "torchinductor"
    ),
}
FLAGS = "--enforce-eager --max-model-len 2048 --dtype float32 --served-model-name tiny --host 127.0.0.1 --port {port}"
_MAKE = "import pathlib, sys; from dynamo_worker.testing.tiny_model import make; make(pathlib.Path(sys.argv[1]))"


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the kit's tiny model, which vLLM's own environment can make."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "core" / "src")}
    subprocess.run([PYTHON, "-c", _MAKE, path], check=True, env=environment)
    return path


@pytest.fixture
def subject(vllm_model: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # What `vllm serve` runs; that program itself does not start where the package's name is vllm-cpu.
    command = f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {vllm_model} {FLAGS}"
    return Subject(
        "server",
        ["--server-process", "VLLM::EngineCore", "--server-command", command],
        model="tiny",
        start_seconds=400.0,
        processes={"server": r"api_server --model", "core": r"VLLM::EngineCore"},
        migrates=False,
        stream_tokens=700,
        start_stages=(r"Initializing a V1 LLM engine",),
        stall_timeout=10.0,
    )


def test_serves(cluster: Cluster) -> None:
    (worker,) = cluster.serve(1)
    chat = cluster.ask(5)
    assert chat.ok
    assert chat.finish_reason == "length"
    worker.stop()


class TestVllm(FaultTable):
    """Rows that need a particular engine."""

    GRACE = (*FaultTable.GRACE, *PATIENT)


@pytest.fixture(autouse=True)
def _only_rows_of_engines(request: pytest.FixtureRequest) -> None:
    if request.cls is TestVllm and request.node.originalname in OF_THE_WORKER:
        pytest.skip("a row of the worker, which llama.cpp shows in seconds")
