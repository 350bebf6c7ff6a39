"""The echo engine keeps what every engine plugin has to keep, in both of its forms."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance


class TestEcho(EngineConformance):
    pass


class TestEchoText(EngineConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject("echo", ["--text", "--process-tree"])


class TestEchoEmbedding(EngineConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject("echo", ["--embedding", "--process-tree"])


class TestEchoEmbeddingOfText(EngineConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject("echo", ["--embedding", "--text"])


class TestEchoProcessTree(EngineConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject("echo", ["--process-tree"])
