"""The fault table on the real SGLang: real model, real processes, real frontend."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing.fault_table import DEFAULT_STALL_TIMEOUT, FaultTable

if TYPE_CHECKING:
    from conftest import Standstills
    from dynamo_worker.testing import Cluster, Subject
    from dynamo_worker.testing.fault_table import Start


@pytest.mark.timeout(400)
class TestSglang(FaultTable):
    @pytest.mark.parametrize(
        ("seconds", "bound"),
        [(20.0, None), pytest.param(60.0, DEFAULT_STALL_TIMEOUT, marks=pytest.mark.slow)],
        ids=["short", "default"],
    )
    def test_standing_still_at_work(
        self, cluster: Cluster, subject: Subject, start: Start, standstills: Standstills,
        seconds: float, bound: float | None,
    ) -> None:  # fmt: skip
        """The scheduler compiles for longer than a hang may take, and answers no health check either."""
        bound = bound or subject.stall_timeout
        standstills.prepare(seconds)
        (worker,) = start(1, "--stall-timeout", str(bound), "--health-check-timeout", str(bound))
        process = worker.child(subject.processes["scheduler"])
        for sign, number in standstills.SIGNALS.items():
            load = self.busy(cluster, subject, worker)
            worker.signal(number, process)
            self.assert_complete(load, subject)
            standstills.check(worker, sign)
        since = worker.signal(signal.SIGSTOP, process)
        assert self.assert_gone(worker, since, bound + 1.0, subject) == 1
        assert re.search(rf"Fatal error kind=EngineStalledError .*process {process} .* is stopped", worker.log)
