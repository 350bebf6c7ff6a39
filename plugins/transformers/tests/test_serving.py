"""Whole workers behind the real frontend: what every engine has to show, and what only transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.serving import Metrics, Serving, SharedWorker


@pytest.mark.timeout(300)
class TestTransformers(Serving):
    METRICS: ClassVar = Metrics(
        "transformers:requests_total", "transformers:generated_tokens_total", "transformers:running_requests"
    )
    REFUSED: ClassVar = (({"temperature": 1.0, "use_beam_search": True}, "use_beam_search"),)
    ADAPTERS: ClassVar = ("--enable-lora",)

    def test_an_answer_that_follows_a_json_schema(self, answering: Cluster) -> None:
        """There is no grammar backend."""
        answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
        status, answer = answering.chat(response_format=answer_format)
        assert status == 400
        assert "guided_decoding.json is not supported" in json.dumps(answer)

    def test_the_worker_itself_stays_small(self, answering: Cluster, shared: SharedWorker) -> None:
        """It imports neither PyTorch nor transformers: the model is in the other process."""
        assert answering.complete()[0] == 200
        processes = {"supervisor": shared.worker.pid, **{name: pid for pid, name in shared.worker.children().items()}}
        heavy = [name for name, pid in processes.items() if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
        assert len(heavy) == 1, heavy
        assert "dynamo_worker_transformers.core" in heavy[0]

    def test_seeds_and_penalties(self, answering: Cluster) -> None:
        """What transformers' own batching has no parameters for."""

        def text(**given: object) -> str:
            status, answer = answering.complete(max_tokens=24, **given)
            assert status == 200, answer
            return str(answer["choices"][0]["text"])

        assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
        assert text(frequency_penalty=2.0) == text(frequency_penalty=2.0) != text()
