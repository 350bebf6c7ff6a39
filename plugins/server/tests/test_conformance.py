"""llama.cpp behind the server engine keeps what every engine has to keep."""

from __future__ import annotations

from dynamo_worker.testing.conformance import EngineConformance


class TestLlamaCpp(EngineConformance):
    pass
