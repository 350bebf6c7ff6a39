"""vLLM keeps what every engine plugin has to keep."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.conformance import EngineConformance


class TestVllm(EngineConformance):
    ENGINE = "vllm"
    START_SECONDS = 180.0

    @pytest.fixture(autouse=True)
    def _arguments(self, flags: list[str]) -> None:
        self.ARGS = flags
