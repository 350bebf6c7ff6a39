"""The fault table on the real SGLang: real model, real processes, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.fault_table import FaultTable, Subject


@pytest.mark.timeout(400)
class TestSglang(FaultTable):
    @pytest.fixture
    def subject(self, flags: list[str]) -> Subject:
        return Subject(
            args=["--engine", "sglang", *flags],
            processes={"scheduler": r"sglang::scheduler"},
            model="tiny",
            stream_tokens=1500,
            start_seconds=120.0,
            start_stages=(r"Load weight begin",),
            stall_timeout=10.0,
        )
