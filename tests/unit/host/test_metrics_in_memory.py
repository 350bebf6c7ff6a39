"""The worker's own metrics stay in memory, even if the operator has set a directory for those of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os
from dynamo_worker.host.status.metrics_in_memory import keep_in_memory
keep_in_memory()
from prometheus_client import Counter
Counter("a", "A").inc()
print(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
"""


def test_no_file_is_written_and_processes_find_the_variable(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    printed = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == f"{tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_does_not_exist_stops_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)


def test_without_the_variable_none_appears() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    printed = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == "None\n"
