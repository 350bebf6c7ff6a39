"""Prefill and decode on different workers, with a KV connector that holds blocks for a lease (`leases.py`)."""

from __future__ import annotations

import json
import os
import signal
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing import eventually
from dynamo_worker.testing.client import chat

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.testing import Cluster, Worker

#: Seconds that the decode worker waits for a KV cache: longer than it takes a client to leave.
TRANSFER = 3.0


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Callable[..., Worker]:
    """Start a worker of one phase."""
    folder = tmp_path / "transfers"
    folder.mkdir()

    def started(mode: str, *flags: str, lease: float = 30.0, seconds: float = 0.0) -> Worker:
        transfer = {
            "kv_connector": "LeaseConnector",
            "kv_connector_module_path": "leases",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"directory": str(folder), "lease": lease, "seconds": seconds},
        }
        component = ("--component", "prefill") if mode == "prefill" else ()
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        return cluster.start_worker(
            *component, "--kv-transfer-config", json.dumps(transfer), "--block-size", "32", *flags,
            "--disaggregation-mode", mode, PYTHONPATH=path, PYTHONHASHSEED=None, VLLM_NO_USAGE_STATS=None,
        )  # fmt: skip

    return started


def held(worker: Worker) -> float:
    """Return the share of a worker's KV cache that is in use."""
    return worker.metric("vllm:kv_cache_usage_perc")


def ask(cluster: Cluster, prompt: str) -> HTTPConnection:
    """Send a request whose client can leave."""
    connection = HTTPConnection(cluster.url.removeprefix("http://"), timeout=60)
    body = json.dumps(chat(cluster.model, prompt, 500))
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    return connection


def stop_within_a_second(worker: Worker) -> None:
    """Stop a worker without a grace period that holds nothing, and check that its drain waits for nothing."""
    since = worker.signal(signal.SIGTERM)
    worker.wait_log("Cleaning up worker", 10)
    assert time.monotonic() - since <= 1, worker.log[-4000:]
    assert worker.wait_gone() == 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("idle", "lease", "stall"),
    [(20.0, 4.0, "10"), (120.0, 30.0, "30")],
    ids=["short", "2 minutes"],
)
@pytest.mark.slow  # the prefill worker of a transfer holds none either
def test_an_idle_prefill_worker_holds_no_blocks(
    start: Callable[..., Worker], idle: float, lease: float, stall: str
) -> None:
    """Neither its warm-up nor its canaries leave anything that no decode worker ever fetches."""
    worker = start("prefill", "--stall-timeout", stall, "--grace-period", "0", lease=lease).wait_ready()
    until = time.monotonic() + idle
    while time.monotonic() < until:
        time.sleep(0.5)
        assert held(worker) == 0, worker.log[-4000:]
    stop_within_a_second(worker)
    assert "Releasing expired blocks" not in worker.log


@pytest.mark.timeout(400)
def test_a_transfer(cluster: Cluster, start: Callable[..., Worker], tmp_path: Path) -> None:
    """What clients read of it, what an abort in its midst leaves, and what the two workers agree on."""
    cluster.start_frontend()
    prefill, decode = start("prefill", "--grace-period", "0"), start("decode", seconds=TRANSFER)
    for worker in (prefill, decode):
        worker.wait_ready()
    cluster.wait_model()
    eventually(lambda: cluster.chat()[0] == 200, 30, "an answer")

    # Everything that was transferred is in the decode worker's cache; only the prefill worker knows what was before.
    prompt = "0123456789" * 40
    for expected in (lambda cached, tokens: cached == 0, lambda cached, tokens: 0 < cached < tokens):
        status, answer = cluster.complete(prompt, max_tokens=5)
        assert status == 200, answer
        usage = answer["usage"]
        assert usage["completion_tokens"] == 5
        assert expected((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0), usage["prompt_tokens"])

    # The client leaves while the KV cache is on its way: the decode worker lets it arrive.
    clients = [ask(cluster, f"{number}bcdefghij" * 30) for number in range(3)]
    eventually(lambda: decode.metric("dynamo_worker_in_flight") == 3, 20, "the requests to reach the decode worker")
    for client in clients:
        client.close()
    eventually(lambda: decode.metric("dynamo_worker_in_flight") == 0, 10, "the clients to be gone")
    eventually(lambda: held(decode) == 0 and held(prefill) == 0, TRANSFER + 20, "their blocks to be free")
    assert cluster.complete("and on" * 20, max_tokens=5)[0] == 200, decode.log[-4000:]
    assert "Fatal error" not in decode.log

    # Blocks are found by hashes: they are the same in all processes.
    cores = [json.loads(path.read_text()) for path in (tmp_path / "transfers").glob("core-*.json")]
    assert {core["parent"] for core in cores} == {prefill.worker_pid, decode.worker_pid}
    assert len({core["hash"] for core in cores}) == 1, cores
    for core in cores:
        assert (core["PYTHONHASHSEED"], core["VLLM_NO_USAGE_STATS"]) == ("0", "1")
        assert b"\0PYTHONHASHSEED=0\0" in b"\0" + Path(f"/proc/{core['parent']}/environ").read_bytes()

    stop_within_a_second(prefill)
    decode.stop()
    assert "Releasing expired blocks" not in prefill.log
