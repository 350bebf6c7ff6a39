"""Errors of an accelerator, which some engines report as errors of a single request."""

from __future__ import annotations

import re
from typing import Final

_DEVICE_IS_GONE: Final = re.compile(
    "cuda error|cudaerror|cublas_status|cudnn_status|illegal memory access|device-side assert|"
    "unspecified launch failure|nccl error|ncclsystemerror|ncclremoteerror|uncorrectable ecc",
    re.IGNORECASE,
)


def is_gone(text: str) -> bool:
    """Return whether an error's text says that a device, or the connection between several, cannot be used any more.

    No later request would succeed: the engine is dead (:class:`~dynamo_worker.errors.EngineDeadError`).
    """
    return _DEVICE_IS_GONE.search(text) is not None
