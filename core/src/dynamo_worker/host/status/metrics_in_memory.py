"""Keeps this process's Prometheus metrics in memory, whatever directory the operator has set for those of others."""

from __future__ import annotations

import importlib
import os
from typing import Final

_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def keep_in_memory() -> None:
    """Import ``prometheus_client`` without its variable, which it reads only then; later processes find the variable.

    With it, metrics would go into files. Another worker with the same pid, such as this one before its container was
    restarted, would continue them.
    """
    given = os.environ.pop(_VARIABLE, None)
    try:
        importlib.import_module("prometheus_client")
    finally:
        if given is not None:
            os.environ[_VARIABLE] = given
