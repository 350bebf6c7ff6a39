"""Requests through the real frontend, runtime and worker."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request

import pytest

from dynamo_worker.testing import Cluster, Load, Worker, eventually
from dynamo_worker.testing.client import chat


@pytest.fixture
def worker(cluster: Cluster) -> Worker:
    cluster.start_frontend()
    worker = cluster.worker("--grace-period", "0")
    cluster.wait_model()
    return worker


def post(url: str, body: object) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(worker: Worker, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", worker.status("/metrics")[1], re.MULTILINE)
    assert match, f"{name} is not in /metrics"
    return float(match[1])


def test_chat(cluster: Cluster, worker: Worker) -> None:
    status, body = post(
        f"{cluster.url}/v1/chat/completions",
        {"model": "echo", "messages": [{"role": "user", "content": "Grüße, world"}]},
    )
    assert status == 200
    answer = json.loads(body)
    assert answer["choices"][0]["message"]["content"] == "Grüße, world"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_completions(cluster: Cluster, worker: Worker) -> None:
    status, body = post(f"{cluster.url}/v1/completions", {"model": "echo", "prompt": "abc", "max_tokens": 7})
    assert status == 200
    assert json.loads(body)["choices"][0]["text"] == "abcabca"


def test_a_connection_that_is_kept_gets_its_tokens_at_once(cluster: Cluster, worker: Worker) -> None:
    """With Nagle's algorithm every answer but the first waits 40 ms for an acknowledgement, on any machine."""
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    connection = http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=30)
    seconds = []
    for _ in range(20):
        since = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data:")
        seconds.append(time.monotonic() - since)
        assert answer.read().rstrip().endswith(b"data: [DONE]")
    connection.close()
    assert min(seconds[1:]) < 0.03


def test_streams_are_counted(cluster: Cluster, worker: Worker) -> None:
    before = metric(worker, "dynamo_worker_chunks_total")
    load = cluster.load(32, 100)
    assert all(result.ok and len(result.text) == 100 for result in load.wait()), load.summary()
    assert metric(worker, "dynamo_worker_chunks_total") - before == 3200
    assert metric(worker, 'dynamo_worker_requests_total{outcome="completed"}') == 32
    assert metric(worker, "dynamo_worker_in_flight") == 0


def test_a_thousand_streams(cluster: Cluster, worker: Worker) -> None:
    load = cluster.load(1000, 20)
    results = load.wait()
    assert all(result.ok and len(result.text) == 20 for result in results), load.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n must be 1"),
        ({"response_format": {"type": "json_object"}}, "guided_decoding"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(
    cluster: Cluster, worker: Worker, options: dict[str, object], message: str
) -> None:
    load = cluster.load(2, 200)
    status, body = post(f"{cluster.url}/v1/chat/completions", {**chat("echo", "hello", 5), **options, "stream": False})
    assert (status, message in body) == (400, True), (status, body)
    assert all(result.ok for result in load.wait()), load.summary()
    assert worker.running


def test_too_long_a_prompt_is_refused(cluster: Cluster, worker: Worker) -> None:
    status, body = post(f"{cluster.url}/v1/completions", {"model": "echo", "prompt": "x" * 140_000, "max_tokens": 4})
    assert status == 400, body


def test_a_client_that_goes_away_is_noticed(cluster: Cluster) -> None:
    cluster.start_frontend()
    worker = cluster.worker("--tokens-per-second", "50")
    cluster.wait_model()
    request = urllib.request.Request(
        f"{cluster.url}/v1/chat/completions",
        json.dumps(chat("echo", "hello", 5000)).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        response.readline()
        assert metric(worker, "dynamo_worker_in_flight") == 1
    eventually(lambda: metric(worker, "dynamo_worker_in_flight") == 0, 5, "the request to be cancelled")
    assert metric(worker, 'dynamo_worker_requests_total{outcome="cancelled"}') == 1


def test_readiness_and_liveness_follow_the_lifecycle(cluster: Cluster) -> None:
    cluster.start_frontend()
    worker = cluster.start_worker("--start-seconds", "1", "--tokens-per-second", "100", "--grace-period", "1")
    eventually(lambda: worker.status("/live")[0] == 200, 10, "/live while starting")
    assert worker.status("/health")[0] == 503
    worker.wait_ready()
    assert worker.status("/health")[0] == 200
    cluster.wait_model()
    load = cluster.load(2, 300)
    worker.signal(15)  # SIGTERM
    worker.wait_log("Draining")
    assert worker.status("/live")[0] == 200
    assert worker.status("/health")[0] == 503
    assert metric(worker, 'dynamo_worker_state{state="DRAINING"}') == 1
    assert metric(worker, "dynamo_worker_in_flight") == 2
    assert all(result.ok for result in load.wait()), load.summary()
    assert worker.wait_gone() == 0


def test_the_embedded_frontend_answers_within_seconds(cluster: Cluster) -> None:
    started = time.monotonic()
    worker = cluster.start_worker("--frontend", "127.0.0.1:18123", DYN_FILE_KV=None, DYN_DISCOVERY_BACKEND=None)
    cluster.url = "http://127.0.0.1:18123"
    cluster.wait_model(10)
    result = cluster.ask(5, "Hello")
    print(f"first answer after {time.monotonic() - started:.2f} s")
    assert result.ok, result
    assert result.text == "Hello"
    worker.wait_log("Try it")
    worker.signal(15)
    assert worker.wait_gone() == 0


def test_loads_of_two_frontends_do_not_mix(cluster: Cluster, worker: Worker) -> None:
    """Two loads with different prompts at once: every stream gets its own text."""
    first = Load(cluster.url, [chat("echo", "first", 50) for _ in range(20)])
    second = Load(cluster.url, [chat("echo", "second", 50) for _ in range(20)])
    assert {result.text for result in first.wait()} == {("first" * 10)[:50]}
    assert {result.text for result in second.wait()} == {("second" * 10)[:50]}
