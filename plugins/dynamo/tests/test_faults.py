"""The fault table on Dynamo's sample engine, which runs in the worker itself."""

from __future__ import annotations

from dynamo_worker.testing.fault_table import FaultTable


class TestSample(FaultTable):
    pass
