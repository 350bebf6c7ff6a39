"""One bad request harms nobody else; an engine that a request finds dead ends the worker, and the request moves on."""

from __future__ import annotations

import signal

import pytest

from dynamo_worker.testing import Load
from dynamo_worker.testing.client import Result, chat

from .conftest import FaultyCluster


def ask(faulty: FaultyCluster, prompt: str) -> Result:
    return Load(faulty.cluster.url, [chat("echo", prompt, 10)]).wait()[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("poison", "Internal server error"), ("bad", "temperature must not be negative"), ("unserializable", "")],
)
def test_one_bad_request_harms_no_other(faulty: FaultyCluster, prompt: str, message: str) -> None:
    worker = faulty.serving("--tokens-per-second", "100")
    load = faulty.cluster.load(8, 200)
    for _ in range(5):
        result = ask(faulty, prompt)
        assert not result.ok
        assert message in (result.error or "")
    assert all(result.ok for result in load.wait()), load.summary()
    assert ask(faulty, "well").ok
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_an_engine_found_dead_by_a_request(faulty: FaultyCluster) -> None:
    """The first worker dies of the request, the second one (an echo engine) answers it and all the others."""
    worker = faulty.serving("--tokens-per-second", "100", "-p", "witness")
    load = faulty.cluster.load(8, 200)
    faulty.cluster.engine_args = ["--engine", "echo"]
    faulty.cluster.wait_routed(faulty.cluster.worker())
    deaths = Load(faulty.cluster.url, [chat("echo", "dead", 10) for _ in range(2)])
    assert worker.wait_gone(10) == 1
    assert 'kind=EngineDeadError error="CUDA error: an illegal memory access was encountered"' in worker.log
    assert "witness: on_fatal_error" in worker.log
    assert all(result.ok for result in load.wait()), load.summary()
    assert all(result.ok for result in deaths.wait()), deaths.summary()
