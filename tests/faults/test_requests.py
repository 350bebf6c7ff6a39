"""One bad request harms nobody else; an engine that a request finds dead ends the worker, and the request moves on."""

from __future__ import annotations

import signal

from dynamo_worker.testing import Load
from dynamo_worker.testing.client import Result, chat

from .conftest import FaultyCluster


def ask(faulty: FaultyCluster, prompt: str) -> Result:
    return Load(faulty.cluster.url, [chat("echo", prompt, 10)]).wait()[0]


#: What a request makes the engine do, what its client is told, and what the worker logs.
BAD_REQUESTS = {
    "poison": ("Internal server error", "RuntimeError: a request the engine cannot digest"),
    "bad": ("temperature must not be negative", 'Request refused .*error="temperature must not be negative"'),
    "bug": ("Internal server error", "ValueError: not enough values to unpack"),
    "unserializable": ("Internal server error", "unsupported type object"),
    "panic": ("", r"PanicException: called `Option::unwrap\(\)`"),
    "exit": ("", "SystemExit: 0"),
    "interrupt": ("", "KeyboardInterrupt"),
    "cancel": ("", "CancelledError"),
}


def test_one_bad_request_harms_no_other(faulty: FaultyCluster) -> None:
    worker = faulty.serving("--tokens-per-second", "100")
    load = faulty.cluster.load(8, 300)
    for prompt, (message, logged) in BAD_REQUESTS.items():
        result = ask(faulty, prompt)
        assert not result.ok, prompt
        assert message in (result.error or ""), (prompt, result.error)
        worker.wait_log(logged)
    assert all(result.ok for result in load.wait()), load.summary()
    assert ask(faulty, "well").ok
    assert worker.metric('dynamo_worker_requests_total{outcome="cancelled"}') == 0
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_a_request_that_the_engine_cancels_goes_on_elsewhere(faulty: FaultyCluster) -> None:
    """It counted as a client that has gone away: 499, and nobody was told."""
    worker = faulty.serving("--tokens-per-second", "100")
    faulty.cluster.engine_args = ["--engine", "echo"]
    faulty.cluster.wait_routed(faulty.cluster.worker())
    results = Load(faulty.cluster.url, [chat("echo", "cancel", 10) for _ in range(4)]).wait()
    assert all(result.ok for result in results), [result.error for result in results]
    worker.wait_log("CancelledError")


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
