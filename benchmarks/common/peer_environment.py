"""The peer: a virtual environment of its own, outside of the repository, with NVIDIA's `ai-dynamo` package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.report import progress

if TYPE_CHECKING:
    from collections.abc import Mapping

PEER_VERSION = "1.6.1"

#: Without their dependencies: `ai-dynamo` asks for torch-sized packages that its `dynamo.common.backend` never imports.
_WITHOUT_DEPENDENCIES = (f"ai-dynamo=={PEER_VERSION}", f"ai-dynamo-runtime=={PEER_VERSION}")
#: What `dynamo.common.backend` imports. The versions of this environment are taken, where it has them, so that the
#: peer and dynamo-worker run on the same uvloop.
_NEEDED = ("uvloop>=0.21", "pydantic>=2.10.6,<=2.13.5", "typing-extensions")
_CHECK = "import dynamo.common.backend.run, sys; from importlib.metadata import version; print(version('ai-dynamo'))"

#: What NVIDIA's workers for engines import beside the engine: the module, and what to install where it is missing.
_ENGINE_WORKER_NEEDS = {
    "redis": "redis==8.1.0",
    "blake3": "blake3==1.0.11",
    "torchvision": "torchvision==0.28.0",
    "msgspec": "msgspec==0.22.0",
    "PIL": "pillow==13.0.0",
    "zstandard": "zstandard==0.25.0",
}
#: What lets them be imported on a CPU, where operators are missing that only CUDA libraries, or a build of sgl-kernel
#: for CPUs, define: torchvision from the package index looks for two, and the models that the worker for SGLang imports
#: for four. Nothing here calls one. An environment that has torchvision has mended it, too.
_OPERATORS = """
import importlib.abc
import pathlib
import sys

_MISSING = {
    "torchvision": ("torchvision", {
        name: "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")
    }),
    "sglang.srt.models.qwen3_5": ("sgl_kernel", {
        name: "() -> ()"
        for name in (
            "fused_sigmoid_mul_cpu",
            "fused_qk_gemma_rmsnorm_cpu",
            "fused_qk_gemma_rmsnorm_with_gate_cpu",
            "fused_qkvzba_split_reshape_cat_contiguous_cpu",
        )
    }),
}
if not pathlib.Path(__file__).with_name("torchvision").exists():
    del _MISSING["torchvision"]
_libraries = []


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in _MISSING:
            library, operators = _MISSING.pop(name)
            import torch

            if torch.cuda.is_available():
                return
            _libraries.append(torch.library.Library(library, "FRAGMENT"))
            for operator, signature in operators.items():
                if not hasattr(getattr(torch.ops, library), operator):
                    _libraries[-1].define(operator + signature)


sys.meta_path.insert(0, _Finder())
"""


class PeerEnvironmentError(Exception):
    """The peer's environment cannot be made here."""


def cache_directory() -> Path:
    """Return where things are kept between runs: below the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo-worker-benchmarks"


def default_location() -> Path:
    """Return where the peer's environment is kept."""
    return cache_directory() / f"peer-{_version_here()}"


def ensure(location: Path | None = None) -> Path:
    """Return the Python of the peer's environment; make the environment first when it is not there.

    :param location: directory of the environment; `default_location()` when None.
    :raises PeerEnvironmentError: it cannot be made (no network, no such version …).
    """
    directory = (location or default_location()).absolute()
    python = directory / "bin" / "python"
    if python.exists() and _works(python):
        progress(f"peer: ai-dynamo {PEER_VERSION} in {directory}")
        return python
    progress(f"peer: making a virtual environment with ai-dynamo {PEER_VERSION} in {directory} (once, about 300 MB)")
    start = time.monotonic()
    _run(sys.executable, "-m", "venv", "--clear", str(directory))
    progress("peer: installing " + ", ".join(_WITHOUT_DEPENDENCIES) + " without dependencies")
    _pip(python, "--no-deps", *_WITHOUT_DEPENDENCIES)
    needed = [_like_here(requirement) for requirement in _NEEDED]
    progress("peer: installing " + ", ".join(needed))
    _pip(python, *needed)
    if not _works(python):
        raise PeerEnvironmentError(f"{python} cannot import dynamo.common.backend; remove {directory} and try again")
    progress(f"peer: ready after {time.monotonic() - start:.0f} s")
    return python


def ensure_packages(module: str, variables: Mapping[str, str]) -> Path:
    """Return a directory with NVIDIA's own worker for an engine, to be put on the path of this very environment.

    So both workers run on the same engine, the same torch and the same runtime.

    :param module: the worker, ``dynamo.vllm`` for one.
    :param variables: environment variables that its engine needs.
    :raises PeerEnvironmentError: it cannot be installed, or not be imported.
    """
    # What an environment lacks depends on its engine and its Python.
    engine = module.rpartition(".")[2]
    directory = cache_directory() / f"peer-packages-{_version_here()}-{engine}"
    if not (directory / "dynamo").exists():
        progress(f"peer: installing ai-dynamo {PEER_VERSION} into {directory} (once, about 50 MB)")
        missing = [package for name, package in _ENGINE_WORKER_NEEDS.items() if importlib.util.find_spec(name) is None]
        with tempfile.TemporaryDirectory() as tools:  # an environment that uv has made has no pip of its own
            _run(sys.executable, "-m", "venv", tools)
            python = Path(tools, "bin", "python")
            _pip(python, "--no-deps", "--target", str(directory), _WITHOUT_DEPENDENCIES[0], *missing)
        (directory / "sitecustomize.py").write_text(_OPERATORS)
    environment = {**os.environ, **variables, "PYTHONPATH": str(directory)}
    check = [sys.executable, "-c", f"import {module}.main"]
    # Not where the benchmarks are: they are named like engines.
    result = subprocess.run(check, capture_output=True, text=True, check=False, env=environment, cwd=directory)
    if result.returncode != 0:
        raise PeerEnvironmentError(f"{module} cannot be imported from {directory}:\n{result.stderr.strip()[-1500:]}")
    return directory


def _version_here() -> str:
    return f"{PEER_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"


def _works(python: Path) -> bool:
    result = subprocess.run([str(python), "-c", _CHECK], capture_output=True, text=True, check=False)
    return result.returncode == 0 and result.stdout.strip() == PEER_VERSION


def _like_here(requirement: str) -> str:
    name = requirement.split(">")[0]
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return requirement


def _pip(python: Path, *arguments: str) -> None:
    # pip complains that ai-dynamo lacks its dependencies, rightly; its text is shown only when it fails.
    _run(str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise PeerEnvironmentError(f"`{' '.join(command)}` failed:\n{result.stderr.strip() or result.stdout.strip()}")
