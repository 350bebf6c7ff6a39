"""SGLang keeps what every engine plugin has to keep."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.conformance import EngineConformance


class TestSglang(EngineConformance):
    ENGINE = "sglang"
    START_SECONDS = 120.0

    @pytest.fixture(autouse=True)
    def _arguments(self, flags: list[str]) -> None:
        self.ARGS = flags
