"""vLLM keeps what every engine plugin has to keep."""

from __future__ import annotations

from typing import ClassVar

from dynamo_worker.testing.conformance import EngineConformance


class TestVllm(EngineConformance):
    KEPT_UNTIL_EXIT: ClassVar = {
        "descriptors": "seen: eventfd, eventpoll and a pipe of vLLM 0.31 itself, not traced further; the worker exits "
        "right after the cleanup",
    }
