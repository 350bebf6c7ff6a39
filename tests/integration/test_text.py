"""An engine that takes and gives text, through the real frontend."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.request
from typing import Any

from dynamo_worker.testing import Cluster, Load, Worker, eventually
from dynamo_worker.testing.client import chat

PROMPT = "0123456789"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def text_engine(cluster: Cluster, *flags: str) -> list[str]:
    """Return the arguments of workers, in addition to the cluster's."""
    cluster.engine_args = ["--engine", "echo", "--text", *flags]
    return cluster.engine_args


def events(url: str, body: dict[str, Any]) -> list[Any]:
    """Return the events of a stream, the last one without its ``[DONE]``."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        lines = response.read().decode().splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def test_both_apis_are_served(cluster: Cluster) -> None:
    """One worker for all of it: answers, streams, token counts, stop strings, refusals, a client that leaves."""
    text_engine(cluster, "--grace-period", "0", "--tokens-per-second", "200")
    cluster.start_frontend()
    worker = cluster.worker()
    cluster.wait_model()

    status, answer = cluster.chat("Grüße, world", max_tokens=None)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Grüße, world")
    assert answer["choices"][0]["finish_reason"] == "stop"
    counts = {"prompt_tokens": 14, "completion_tokens": 14, "total_tokens": 28}
    assert counts.items() <= answer["usage"].items()

    status, answer = cluster.complete("abc", max_tokens=7)
    assert (status, answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (200, "abcabca", "length")
    assert answer["usage"]["completion_tokens"] == 7
    status, answer = cluster.complete(["abc", "xy"], max_tokens=3)
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "xyx"]

    body = {**chat("echo", "abc", 5), "stream_options": {"include_usage": True}}
    *chunks, last = events(f"{cluster.url}/v1/chat/completions", body)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "abcab"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 8)
    chunks = events(f"{cluster.url}/v1/completions", {"model": "echo", "prompt": "abc", "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    assert all(chunk["choices"] for chunk in chunks), "nobody has asked for the counts"

    # The frontend detokenizes nothing, so it cannot stop at stop strings: the engine did.
    assert cluster.complete("hello", stop=["lo"])[1]["choices"][0]["text"] == "hel"
    assert cluster.complete("hello", stop="ll")[1]["choices"][0]["finish_reason"] == "stop"

    for field, value in {"tools": TOOLS, "logprobs": True, "response_format": {"type": "json_object"}}.items():
        status, answer = cluster.chat("abc", **{field: value})
        assert (status, answer["message"]) == (400, f"{field} is not supported by this engine")
    status, answer = cluster.chat("abc", n=2)
    assert (status, answer["message"]) == (400, "the echo engine makes only one answer: n must be 1")
    status, answer = cluster.complete("abc", logit_bias={"7": 1})
    assert (status, answer["message"]) == (400, "logit_bias is not supported by this engine")

    assert worker.metric('dynamo_worker_requests_total{outcome="invalid"}') == 5
    before = worker.metric("dynamo_worker_chunks_total")
    leaving = Load(cluster.url, [chat("echo", PROMPT, 100_000)], timeout=0.5)
    eventually(lambda: worker.metric("dynamo_worker_in_flight") == 1, 5, "the request to start")
    assert not leaving.wait()[0].ok
    eventually(lambda: worker.metric('dynamo_worker_requests_total{outcome="cancelled"}') == 1, 5, "the cancellation")
    assert worker.metric("dynamo_worker_chunks_total") > before
    worker.stop()


def test_nothing_migrates(cluster: Cluster) -> None:
    """The frontend sends a text request to one worker only, whatever its migration limit; the others are unharmed."""
    text_engine(cluster, "--tokens-per-second", "40", "--grace-period", "0")
    workers = cluster.serve(2)
    streams = cluster.load(8, 120, prompt=PROMPT)
    whole: list[tuple[int, Any]] = []
    askers = [threading.Thread(target=lambda: whole.append(cluster.chat(PROMPT, 60)), daemon=True) for _ in range(4)]
    for asker in askers:
        asker.start()
    eventually(lambda: sum(worker.metric("dynamo_worker_in_flight") for worker in workers) == 12, 10, "12 requests")
    lost = int(workers[0].metric("dynamo_worker_in_flight"))
    workers[0].signal(signal.SIGKILL, workers[0].worker_pid)
    results = streams.wait()
    for asker in askers:
        asker.join(30)
    broken = [result for result in results if not result.ok]
    refused = [(status, answer) for status, answer in whole if status != 200]
    assert 0 < lost == len(broken) + len(refused)
    for result in broken:
        assert result.text, streams.summary()
        assert "Service temporarily unavailable" in str(result.error), streams.summary()
    assert all(status == 503 for status, _ in refused), refused
    assert cluster.ask(5).ok, "whoever asks again is served"
    workers[0].wait_gone()
    workers[1].stop()


def serving(cluster: Cluster, *flags: str) -> tuple[Worker, Load]:
    """Start a worker behind a frontend, and four streams that last several seconds."""
    text_engine(cluster, "--tokens-per-second", "40", *flags)
    (worker,) = cluster.serve(1)
    return worker, cluster.load(4, 100, prompt=PROMPT)


def test_a_handoff_lets_requests_finish(cluster: Cluster) -> None:
    worker, load = serving(cluster, "--drain", "handoff", "--grace-period", "0.5")
    assert "Requests cannot be handed off" in worker.log
    report = worker.operate("control/drain", {"mode": "handoff"})
    assert report["status"] == "error"
    assert "mode: requests cannot be handed off" in report["message"]
    since = worker.signal(signal.SIGTERM)
    results = load.wait()
    assert all(result.ok for result in results), load.summary()
    assert [len(result.text) for result in results] == [100] * 4
    assert worker.wait_gone() == 0
    assert time.monotonic() - since > 1.0
    assert "Draining mode=complete" in worker.log


def test_what_does_not_finish_in_time_is_ended(cluster: Cluster) -> None:
    """Its clients see an error that tells them to ask again, and the log does not speak of a hand-off."""
    worker, load = serving(
        cluster, "--termination-grace-period", "8", "--grace-period", "0", "--tokens-per-second", "4"
    )
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone(10) == 0
    for result in load.wait():
        assert result.text, load.summary()
        assert "Service temporarily unavailable" in str(result.error), load.summary()
    assert "Aborting requests requests=4" in worker.log
    assert "Handing off" not in worker.log


def test_a_standstill_is_found_by_a_canary_of_text(cluster: Cluster) -> None:
    text_engine(cluster, "--process-tree", "--stall-timeout", "2")
    worker = cluster.worker()
    since = worker.signal(signal.SIGSTOP, worker.engine_process(r"echo_process:Core"))
    assert worker.wait_gone(20) == 1
    assert time.monotonic() - since < 12
    assert "Fatal error kind=EngineStalledError" in worker.log
