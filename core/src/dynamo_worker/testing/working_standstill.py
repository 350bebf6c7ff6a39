"""An engine that stands still because it works, as when it compiles: it gets more time than one that hangs."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, ClassVar, Protocol

import pytest

from dynamo_worker.testing.fault_table import DEFAULT_STALL_TIMEOUT, FaultTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.testing import Cluster, Subject, Worker
    from dynamo_worker.testing.fault_table import Start


class Standstills(Protocol):
    """Makes a process of the engine stand still at work."""

    #: The signals that do it, by a pattern of what the worker says about it.
    SIGNALS: Mapping[str, signal.Signals]

    def prepare(self, seconds: float) -> None:
        """Make workers that start from now on stand still for so long at each signal."""

    def check(self, worker: Worker, sign: str) -> None:
        """Check that a worker has recognized the work."""


class WorkingStandstill(FaultTable):
    """The fault table with such standstills. A plugin's tests have a fixture ``standstills``."""

    #: Which of ``Subject.processes`` stands still.
    WORKING: ClassVar[str]

    @pytest.mark.parametrize(
        ("seconds", "bound"),
        [(20.0, None), pytest.param(60.0, DEFAULT_STALL_TIMEOUT, marks=pytest.mark.slow)],
        ids=["short", "default"],
    )
    def test_standing_still_at_work(
        self, cluster: Cluster, subject: Subject, start: Start, standstills: Standstills,
        seconds: float, bound: float | None,
    ) -> None:  # fmt: skip
        """The process compiles for longer than a hang may take; once it is stopped, it is gone in time all the same."""
        bound = bound or subject.stall_timeout
        standstills.prepare(seconds)
        (worker,) = start(1, "--stall-timeout", str(bound), "--health-check-timeout", str(bound))
        process = worker.child(subject.processes[self.WORKING])
        for sign, number in standstills.SIGNALS.items():
            load = self.busy(cluster, subject, worker)
            worker.signal(number, process)
            self.assert_complete(load, subject)
            standstills.check(worker, sign)
        since = worker.signal(signal.SIGSTOP, process)
        assert self.assert_gone(worker, since, bound + 1.0, subject) == 1
        assert re.search(rf"Fatal error kind=EngineStalledError .*process {process} .* is stopped", worker.log)
