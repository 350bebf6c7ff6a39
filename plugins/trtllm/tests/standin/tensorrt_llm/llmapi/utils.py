"""Small things of the API."""

from __future__ import annotations

import sys
from typing import Any

from tensorrt_llm.llmapi.llm_args import StrictBaseModel

__all__ = ["StrictBaseModel", "print_colored"]


def print_colored(message: Any, color: str | None = None, writer: Any = None) -> None:
    """Write a message; the stand-in knows no colours."""
    (writer or sys.stderr).write(str(message))
