"""vLLM keeps what every engine plugin has to keep."""

from __future__ import annotations

from dynamo_worker.testing.conformance import EngineConformance


class TestVllm(EngineConformance):
    pass
