"""The fault table on the real vLLM: real model, real processes, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.fault_table import FaultTable


@pytest.mark.timeout(400)
class TestVllm(FaultTable):
    pass
