"""The engine keeps what every engine has to keep: `dynamo-worker check acme --conformance` as tests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance


class TestConformance(EngineConformance):
    @pytest.fixture
    def subject(self, subject: Subject) -> Subject:
        """Without the limited rate of the fault table: these tests need many short answers."""
        return replace(subject, flags=())
