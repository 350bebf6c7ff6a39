"""Embeddings on the real vLLM, behind the real frontend: the vectors of vLLM alone, and the faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.embedding_serving import EmbeddingServing


@pytest.mark.timeout(900)
class TestVllm(EmbeddingServing):
    DIRECT: ClassVar = Path(__file__).parent / "direct_embeddings.py"

    @pytest.fixture
    def subject(self, subject: Subject) -> Subject:
        flags = ("--embedding-worker", "--hf-overrides", '{"is_matryoshka": true}')
        return replace(subject, flags=[*subject.flags, *flags], start_seconds=300.0)
