"""The engine's own answers, as a client sees them."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Cluster


@pytest.fixture
def engine_args() -> list[str]:
    return ["--engine", "acme", "--grace-period", "0"]


def test_a_client_gets_the_answer(cluster: Cluster) -> None:
    worker = cluster.worker_with_frontend()
    cluster.wait_model()
    whole = cluster.ask(100, "Hello, world!")
    assert (whole.text, whole.finish_reason) == ("HELLO, WORLD!", "stop")
    cut = cluster.ask(5, "Hello, world!")
    assert (cut.text, cut.finish_reason) == ("HELLO", "length")
    status, answer = cluster.chat(presence_penalty=1.5)
    assert status == 400
    assert "presence_penalty" in str(answer)
    worker.stop()
