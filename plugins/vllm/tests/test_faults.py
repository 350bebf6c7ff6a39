"""The fault table on the real vLLM: real model, real processes, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Cluster, Load, Worker
from dynamo_worker.testing.fault_table import FaultTable, Subject

#: Tests whose streams go on elsewhere. vLLM starts too slowly for a second worker to come up while streams run.
NEED_A_SPARE = (
    "test_engine_process_killed_busy",
    "test_engine_process_stopped_busy",
    "test_worker_killed_busy",
    "test_handoff",
)


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
        )

    @pytest.fixture(autouse=True)
    def _name(self, request: pytest.FixtureRequest) -> None:
        self.name = request.node.name

    def busy(self, cluster: Cluster, subject: Subject) -> Load:
        if self.name in NEED_A_SPARE:
            super().second(cluster, subject)
        return super().busy(cluster, subject)

    def second(self, cluster: Cluster, subject: Subject) -> Worker:
        return None  # type: ignore[return-value] # it is there already
