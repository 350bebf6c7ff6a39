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
    status, answer = cluster.chat("Hello, world!", max_tokens=100, stop="!")
    assert status == 200
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("HELLO, WORLD", "stop")
    assert answer["usage"]["completion_tokens"] == len("HELLO, WORLD")
    cut = cluster.ask(5, "Hello, world!")
    assert (cut.text, cut.finish_reason) == ("HELLO", "length")
    status, answer = cluster.chat(presence_penalty=1.5)
    assert status == 400
    assert "presence_penalty" in str(answer)
    worker.stop()
