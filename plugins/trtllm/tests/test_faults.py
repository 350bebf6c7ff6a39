"""The fault table on TensorRT-LLM's processes: real `orted`, real ranks, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.fault_table import FaultTable


@pytest.mark.timeout(400)
class TestTrtllm(FaultTable):
    pass
