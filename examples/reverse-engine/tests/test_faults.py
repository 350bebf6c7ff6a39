"""Everything that can go wrong with a worker, done to this engine."""

from __future__ import annotations

from dynamo_worker.testing.fault_table import FaultTable


class TestReverse(FaultTable):
    pass
