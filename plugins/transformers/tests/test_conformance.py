"""transformers keeps what every engine plugin has to keep."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.conformance import EngineConformance


@pytest.mark.timeout(300)
class TestTransformers(EngineConformance):
    pass
