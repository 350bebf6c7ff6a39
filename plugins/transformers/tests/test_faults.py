"""The fault table on the real transformers: real model, real process, real frontend."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.fault_table import FaultTable


@pytest.mark.timeout(300)
class TestTransformers(FaultTable):
    pass
