"""Which errors mean that the device is lost."""

from __future__ import annotations

import pytest

from dynamo_worker.kit import device_errors


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("NCCL error in: all_reduce, remote process exited", True),
        ("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx", True),
        ("RuntimeError: device-side assert triggered", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("the prompt exceeds max_num_tokens", False),
    ],
)
def test_a_lost_device(text: str, gone: bool) -> None:
    assert device_errors.is_gone(text) is gone
