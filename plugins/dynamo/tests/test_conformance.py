"""Dynamo's sample engine keeps what every engine has to keep, but for what its class itself does otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from conftest import sample
from dynamo_worker.testing.conformance import EngineConformance

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing import Subject


class TestSample(EngineConformance):
    @pytest.fixture
    def subject(self, model: Path) -> Subject:
        return sample(model, delay=0.0005)
