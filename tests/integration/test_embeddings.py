"""An engine that makes embeddings, through the real frontend."""

from __future__ import annotations

import base64
import json
import math
import signal
import struct
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from dynamo_worker.engines.echo_embedding import DIMENSIONS, embedding
from dynamo_worker.testing import Cluster, Worker, eventually

#: One token is one byte, and three tokens come before them.
A, B, C = (3 + ord(letter) for letter in "abc")


def embedding_engine(cluster: Cluster, *flags: str) -> None:
    cluster.engine_args = ["--engine", "echo", "--embedding", *flags]


def float32(vector: list[float]) -> list[float]:
    return list(struct.unpack(f"<{len(vector)}f", struct.pack(f"<{len(vector)}f", *vector)))


def vectors(answer: Any) -> list[list[float]]:
    """Return the vectors of an answer as 32-bit floats, in the order of their indexes."""
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [float32(one["embedding"]) for one in answer["data"]]


def expected(*inputs: list[int], dimensions: int = DIMENSIONS) -> list[list[float]]:
    return [float32(embedding(tokens, dimensions)) for tokens in inputs]


@pytest.mark.parametrize("takes", ["tokens", "text"])
def test_everything_that_clients_send(cluster: Cluster, takes: str) -> None:
    """One worker for all of it: every form of input, dimensions, base64, counts, refusals by name."""
    embedding_engine(cluster, *(["--text"] if takes == "text" else []), "--grace-period", "0")
    (worker,) = cluster.serve(1)
    for given, inputs in (
        ("abc", [[A, B, C]]),
        (["a", "bc"], [[A], [B, C]]),
        ([A, B], [[A, B]]),
        ([[A], [B, C]], [[A], [B, C]]),
    ):
        status, answer = cluster.embed(given)
        assert (status, answer["object"], answer["model"]) == (200, "list", "echo"), answer
        assert vectors(answer) == expected(*inputs), given
        count = sum(map(len, inputs))
        assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}

    status, answer = cluster.embed("abc", dimensions=8)
    assert vectors(answer) == expected([A, B, C], dimensions=8)
    assert math.isclose(math.hypot(*vectors(answer)[0]), 1.0, abs_tol=1e-6)
    status, answer = cluster.embed(["a", "bc"], encoding_format="base64", dimensions=8)
    raw = [base64.b64decode(one["embedding"]) for one in answer["data"]]
    assert [list(struct.unpack("<8f", one)) for one in raw] == expected([A], [B, C], dimensions=8)
    status, answer = cluster.embed("abc", truncate_prompt_tokens=2)
    assert (vectors(answer), answer["usage"]["prompt_tokens"]) == (expected([A, B]), 2)

    refused = {
        "input: it is empty": {"inputs": []},
        "input[0]: it is empty": {"inputs": ""},
        "input[1]: it is empty": {"inputs": ["a", ""]},
        "input: 2049 inputs are too many, at most 2048 are accepted": {"inputs": ["a"] * 2049},
        "dimensions: expected a number from 1 to 64, got 0": {"inputs": "a", "dimensions": 0},
        "dimensions: 65 are too many, the model's embeddings have 64": {"inputs": "a", "dimensions": 65},
        "input[0] has 131073 tokens; the model's context length is 131072": {"inputs": "a" * 131_073},
    }
    for message, body in refused.items():
        status, answer = cluster.embed(**body)
        assert (status, answer["message"]) == (400, message)
    assert worker.metric('dynamo_worker_requests_total{outcome="invalid"}') == len(refused)
    assert cluster.embed([259])[0] == 400, "the frontend refuses what it cannot decode; the worker does for text"
    assert cluster.embed(["a", 5])[0] == 400
    assert cluster.embed("a", encoding_format="hex")[0] == 400
    assert cluster.embed("abc")[0] == 200, "nobody else was harmed"
    worker.stop()


def test_a_large_batch_holds_nobody_up(cluster: Cluster) -> None:
    """Most inputs, in one answer of 524 kB of vectors, and small ones beside it."""
    embedding_engine(cluster, "--grace-period", "0")
    (worker,) = cluster.serve(1)
    status, answer = cluster.embed([[A, B]] * 2048, encoding_format="base64")
    assert status == 200
    assert {one["embedding"] for one in answer["data"]} == {
        base64.b64encode(struct.pack("<64f", *embedding([A, B]))).decode()
    }
    assert answer["usage"]["prompt_tokens"] == 4096
    assert "blocked" not in worker.log
    worker.stop()


def asked(cluster: Cluster, count: int, letters: int) -> tuple[ThreadPoolExecutor, list[Future[tuple[int, Any]]]]:
    """Send requests of several inputs at once, each with so many tokens."""
    pool = ThreadPoolExecutor(count)
    return pool, [pool.submit(cluster.embed, ["a" * (letters // 2)] * 2) for _ in range(count)]


def in_flight(workers: list[Worker], count: int) -> None:
    eventually(lambda: sum(w.metric("dynamo_worker_in_flight") for w in workers) == count, 10, f"{count} requests")


def test_batches_in_flight_finish_in_a_drain(cluster: Cluster) -> None:
    """No frontend sends them to a second worker, so a hand-off would lose them."""
    embedding_engine(cluster, "--tokens-per-second", "40", "--drain", "handoff", "--grace-period", "0.5")
    (worker,) = cluster.serve(1)
    assert "Requests cannot be handed off" in worker.log
    assert "kind=embeddings" in worker.log
    pool, answers = asked(cluster, 4, 100)
    in_flight([worker], 4)
    since = worker.signal(signal.SIGTERM)
    with pool:
        assert [answer.result()[0] for answer in answers] == [200] * 4
    assert worker.wait_gone() == 0
    assert time.monotonic() - since > 1.0
    assert "Draining mode=complete" in worker.log
    assert worker.log.count("Aborting requests") == 0


@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_a_death_costs_the_requests_in_flight_only(cluster: Cluster, victim: str) -> None:
    """Their clients get 503 at once, which says that they may ask again; and whoever does is served."""
    embedding_engine(cluster, "--process-tree", "--tokens-per-second", "20", "--grace-period", "0")
    workers = cluster.serve(2)
    pool, answers = asked(cluster, 8, 120)
    in_flight(workers, 8)
    lost = int(workers[0].metric("dynamo_worker_in_flight"))
    pid = workers[0].worker_pid if victim == "worker" else workers[0].engine_process(r"echo_process:Core")
    since = workers[0].signal(signal.SIGKILL, pid)
    eventually(lambda: sum(answer.done() for answer in answers) >= lost, 5, "the lost ones to be told")
    told = time.monotonic() - since
    with pool:
        statuses = [answer.result()[0] for answer in answers]
    assert sorted(statuses) == [200] * (8 - lost) + [503] * lost
    assert 0 < lost < 8
    assert told < 4.0, "the others take 6 s"
    workers[0].wait_gone()
    assert cluster.embed("abc")[0] == 200
    workers[1].stop()


def test_a_standstill_is_found_by_a_canary_that_asks_for_an_embedding(cluster: Cluster) -> None:
    embedding_engine(cluster, "--process-tree", "--stall-timeout", "2")
    worker = cluster.worker()
    since = worker.signal(signal.SIGSTOP, worker.engine_process(r"echo_process:Core"))
    assert worker.wait_gone(20) == 1
    assert time.monotonic() - since < 12
    assert "Fatal error kind=EngineStalledError" in worker.log


def test_a_client_that_leaves_ends_the_work(cluster: Cluster) -> None:
    embedding_engine(cluster, "--process-tree", "--tokens-per-second", "20", "--grace-period", "0")
    (worker,) = cluster.serve(1)
    body = json.dumps({"model": "echo", "input": "a" * 10_000}).encode()
    request = urllib.request.Request(f"{cluster.url}/v1/embeddings", body, {"content-type": "application/json"})
    with pytest.raises(OSError, match="timed out"):
        urllib.request.urlopen(request, timeout=1)
    eventually(lambda: worker.metric('dynamo_worker_requests_total{outcome="cancelled"}') == 1, 5, "the cancellation")
    assert worker.metric("dynamo_worker_in_flight") == 0
    worker.stop()


def test_one_command_serves_embeddings(cluster: Cluster) -> None:
    """With ``--frontend``: the worker waits until the model is listed, and says how to ask for it."""
    embedding_engine(cluster)
    worker = cluster.worker_with_frontend("--grace-period", "0")
    assert cluster.embed("abc")[0] == 200
    assert (
        f'{cluster.url}/v1/embeddings -H \'content-type: application/json\' -d \'{{"model": "echo", "input"'
        in worker.log
    )
    worker.stop()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--router-mode", "kv"], "--router-mode kv: the engine makes embeddings, and KV-aware routing needs prompts"),
        (["--endpoint-types", "chat"], "'chat' cannot be served: the engine makes embeddings"),
        (["--endpoint-types", "rerank"], "'rerank' cannot be served: the engine makes embeddings"),
    ],
)
def test_what_cannot_be_served_fails_the_start(cluster: Cluster, flags: list[str], message: str) -> None:
    embedding_engine(cluster)
    worker = cluster.start_worker(*flags)
    assert worker.wait_gone() == 2
    assert message in worker.log
