"""The fault table on the real vLLM: real model, real processes, real frontend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing import Cluster, Subject
from dynamo_worker.testing.working_standstill import WorkingStandstill

if TYPE_CHECKING:
    from dynamo_worker.testing.fault_table import Start


@pytest.mark.timeout(400)
class TestVllm(WorkingStandstill):
    WORKING = "worker"
    ROUNDS = 1

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_each_process_killed_and_stopped_busy_and_idle(
        self, cluster: Cluster, subject: Subject, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TestVllm, "ROUNDS", None)
        self.test_engine_process_killed(cluster, subject, start)
        self.test_engine_process_stopped(cluster, subject, start)
