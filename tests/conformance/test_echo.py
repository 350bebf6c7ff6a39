"""The echo engine keeps what every engine plugin has to keep, in both of its forms."""

from __future__ import annotations

from dynamo_worker.testing.conformance import EngineConformance


class TestEcho(EngineConformance):
    ENGINE = "echo"


class TestEchoProcessTree(EngineConformance):
    ENGINE = "echo"
    ARGS = ("--process-tree",)
