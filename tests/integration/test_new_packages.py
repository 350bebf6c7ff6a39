"""Packages that `dynamo-worker new` writes pass the checks, their own tests and a client's request, as they are."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dynamo_worker.cli.package_writer import TEMPLATES


@pytest.fixture(params=TEMPLATES)
def package(request, tmp_path, monkeypatch):
    """Return a new package; what its wheel contains can be imported by the processes of this test."""
    name = f"fresh-{request.param}"
    run("dynamo_worker", "new", name, "--template", request.param, cwd=tmp_path)
    package = tmp_path / f"dynamo-worker-{name}"
    run("hatchling", "build", "-t", "wheel", cwd=package)
    (wheel,) = (package / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return package


def run(module: str, *arguments: str, cwd: Path, timeout: float = 200) -> str:
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, f"{arguments}:\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.timeout(300)
def test_it_passes_the_checks_and_serves(package):
    name = package.name.removeprefix("dynamo-worker-")
    checked = run("dynamo_worker", "check", name, "--conformance", cwd=package)
    assert f"engine '{name}' from {package.name} 0.1.0: ok" in checked
    assert "warning" not in checked
    assert f"{name}: 0 findings; " in checked
    # A client's request behind `--frontend`, and a row of the fault table; the test below has the others.
    tested = run("pytest", "tests", "-k", "a_client_gets or sigterm_idle", cwd=package)
    assert "2 passed" in tested


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_its_own_tests_pass(package):
    assert " passed" in run("pytest", cwd=package, timeout=600)
