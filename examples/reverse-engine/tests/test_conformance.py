"""The engine keeps what every engine has to keep."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance


class TestReverse(EngineConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        """Without the limited rate of the fault table: these tests need many short answers."""
        return Subject("reverse", model="reverse", processes={"core": r"dynamo_worker_reverse\.core"})
