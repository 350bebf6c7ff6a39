"""The fault table on the real vLLM: real model, real processes, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.working_standstill import WorkingStandstill


@pytest.mark.timeout(400)
class TestVllm(WorkingStandstill):
    WORKING = "worker"
