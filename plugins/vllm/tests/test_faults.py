"""The fault table on the real vLLM: real model, real processes, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.fault_table import FaultTable, Subject


@pytest.mark.timeout(400)
class TestVllm(FaultTable):
    @pytest.fixture
    def subject(self, flags: list[str]) -> Subject:
        return Subject(
            args=["--engine", "vllm", *flags],
            processes={"core": r"VLLM::EngineCore", "worker": r"VLLM::Worker"},
            model="tiny",
            stream_tokens=1500,
            start_seconds=180.0,
            start_stages=(
                r"EngineCore pid=\d+\).* Initializing a V1 LLM engine",
                r"Worker pid=\d+\).* Starting to load",
            ),
            stall_timeout=10.0,
        )
