"""Images in requests, through the real frontend to a real model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from image_checks import check_answers, check_refusals, check_tokens, pictures

from dynamo_worker.testing import Cluster, Subject
from dynamo_worker.testing.tiny_vision_model import make

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def subject(subject: Subject, vision_model: Path) -> Subject:
    flags = ["--model-path", str(vision_model), *subject.flags[2:], "--limit-mm-data-per-request", '{"image": 3}']
    return replace(subject, flags=flags, start_seconds=300.0)


@pytest.mark.timeout(600)
def test_images(cluster: Cluster, vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker, which needs no flag for a model that reads images."""
    # Beside Triton's interpreter, torch cannot read the sources of functions that transformers compiles on import.
    monkeypatch.setenv("PYTORCH_JIT", "0")
    cluster.start_frontend("--router-mode", "kv", DYN_MM_ALLOW_INTERNAL="1")
    (worker,) = cluster.serve(1, "--media-allow-network", "127.0.0.0/8", "--publish-kv-events", "--page-size", "16")
    with pictures(tmp_path / "pictures") as url:
        check_answers(cluster, vision_model, url)
        check_tokens(cluster)
        check_refusals(cluster, url)
    worker.stop()
