"""Everything that can go wrong with a worker, done to this engine behind a real frontend."""

from __future__ import annotations

from dynamo_worker.testing.fault_table import FaultTable


class TestFaults(FaultTable):
    pass
