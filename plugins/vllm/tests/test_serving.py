"""Whole workers behind the real frontend: answers, adapters, sleep, KV-aware routing, divided requests, ranks."""

from __future__ import annotations

import http.client
import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from dynamo_worker.supervisor import gpu
from dynamo_worker.testing import Cluster, Load, Worker, eventually
from dynamo_worker.testing.client import chat
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.tiny_model import make_adapter

pytestmark = pytest.mark.timeout(400)


def test_answers(cluster: Cluster) -> None:
    (worker,) = cluster.serve(1, "--grace-period", "0")
    status, answer = cluster.chat()
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"
    # greedy, by the model's own generation configuration
    assert cluster.chat()[1]["choices"][0]["message"] == answer["choices"][0]["message"]

    status, answer = cluster.chat(logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["logprob"] <= 0 for entry in content)

    status, answer = cluster.complete(n=3, temperature=1.0)
    assert status == 200
    assert {choice["index"] for choice in answer["choices"]} == {0, 1, 2}

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, answer = cluster.chat(response_format=answer_format, max_tokens=200, temperature=1.0)
    assert status == 200, answer
    text = answer["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{"), text

    for wrong, message in (
        ({"prompt": "a " * 3000}, "context"),
        ({"n": 2}, "greedy"),
        ({"temperature": 0.5, "best_of": 3}, "best_of"),
    ):
        status, answer = cluster.complete(**wrong)
        assert 400 <= status < 500, (wrong, answer)
        assert message in json.dumps(answer), (wrong, answer)
    assert cluster.complete()[0] == 200

    code, metrics = worker.status("/metrics")
    assert code == 200
    assert "vllm:generation_tokens_total" in metrics
    check_that_a_client_who_leaves_costs_nothing(cluster, worker)
    worker.stop()


def check_that_a_client_who_leaves_costs_nothing(cluster: Cluster, worker: Worker) -> None:
    before = worker.metric("vllm:generation_tokens_total")
    body = {"model": "tiny", "prompt": "The quick brown fox", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    while b"text" not in response.readline():
        pass
    response.close()
    connection.close()
    # A step takes some milliseconds: the request would run for seconds.
    eventually(lambda: worker.metric("vllm:num_requests_running") == 0, 2, "the end of the abandoned request")
    made = worker.metric("vllm:generation_tokens_total") - before
    assert made < 1000, made


def test_operations(cluster: Cluster, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (worker,) = cluster.serve(1, "--enable-lora", "--max-lora-rank", "8", "--grace-period", "0")
    plain = cluster.complete()[1]["choices"][0]["text"]

    assert "adapter_config" in worker.operate("load_lora", {"lora_name": "x", "source": {"uri": "/nowhere"}})["message"]
    load = {"lora_name": "adapted", "source": {"uri": f"file://{adapter}"}}
    assert worker.operate("load_lora", load)["status"] == "success"
    assert worker.operate("load_lora", load)["status"] == "success"
    assert worker.operate("list_loras")["count"] == 1
    eventually(lambda: "adapted" in cluster.models(), 10, "the adapter in /v1/models")
    status, answer = cluster.complete(model="adapted")
    assert status == 200, answer
    assert answer["choices"][0]["text"] != plain
    assert cluster.complete()[1]["choices"][0]["text"] == plain
    assert worker.operate("unload_lora", {"lora_name": "adapted"})["status"] == "success"
    eventually(lambda: "adapted" not in cluster.models(), 10, "the adapter to leave /v1/models")

    assert worker.operate("reset_prefix_cache")["status"] == "success"
    assert worker.operate("start_profile")["status"] == "error"  # vLLM was not told where to write

    assert worker.operate("sleep", {"level": 0})["status"] == "success"
    eventually(lambda: not cluster.models(), 10, "the sleeping worker to leave discovery")
    assert worker.operate("wake_up")["status"] == "success"
    cluster.wait_model()
    eventually(lambda: cluster.complete()[0] == 200, 10, "an answer after waking up")
    worker.stop()


def test_a_repeated_prefix_goes_to_the_worker_that_holds_it(cluster: Cluster) -> None:
    flags = ("--publish-kv-events", "--block-size", "32", "--grace-period", "0")
    workers = cluster.serve(2, *flags, frontend=("--router-mode", "kv"))
    prompts = [str(number) * 200 for number in range(8)]
    for prompt in prompts:
        assert cluster.complete(prompt)[0] == 200

    def hits() -> int:
        answers = [cluster.complete(prompt + "x")[1] for prompt in prompts]
        details = [answer["usage"].get("prompt_tokens_details") or {} for answer in answers]
        return sum(bool(detail.get("cached_tokens")) for detail in details)

    eventually(lambda: hits() == len(prompts), 20, "every repeated prefix to be found in a cache")
    served = [worker.metric("vllm:request_success_total") for worker in workers]
    assert all(served), f"one worker got everything: {served}"
    for worker in workers:
        worker.stop()


def test_prefill_here_and_decode_there(cluster: Cluster, tmp_path: Path) -> None:
    """Two of each, which share a folder; one of each is killed with requests in flight."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
    }
    flags = ("--kv-transfer-config", json.dumps(transfer), "--block-size", "32", "--grace-period", "0")
    cluster.start_frontend()
    decode = [cluster.start_worker("--disaggregation-mode", "decode", *flags) for _ in range(2)]
    prefill = [
        cluster.start_worker("--disaggregation-mode", "prefill", "--component", "prefill", *flags) for _ in range(2)
    ]
    for worker in (*decode, *prefill):
        worker.wait_ready()
    cluster.wait_model()
    eventually(lambda: cluster.chat()[0] == 200, 20, "an answer")

    def served(worker: Worker) -> float:
        return worker.metric("vllm:request_success_total")

    before = [served(worker) for worker in (*prefill, *decode)]
    for number in range(4):
        status, answer = cluster.complete(f"{number}23456789" * 20, max_tokens=20)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 20
    after = [served(worker) for worker in (*prefill, *decode)]
    assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)
    assert list((tmp_path / "kv").rglob("*.safetensors")), "nothing went through the folder"

    load = cluster.load(8, 1000, prompt="0123456789" * 20)
    assert decode[0].metric("dynamo_worker_in_flight") > 0
    decode[0].signal(signal.SIGKILL, decode[0].worker_pid)
    assert decode[0].wait_gone() == 128 + signal.SIGKILL
    assert all(result.ok for result in load.wait()), load.summary()

    # What is sent to a stopped worker is in flight there until it is killed.
    prefill[0].signal(signal.SIGSTOP, prefill[0].worker_pid)
    load = Load(cluster.url, [chat("tiny", f"{number}" * 300, 50) for number in range(8)])
    time.sleep(1)
    assert not load.started()
    prefill[0].signal(signal.SIGKILL, prefill[0].worker_pid)
    assert prefill[0].wait_gone() == 128 + signal.SIGKILL
    assert all(result.ok for result in load.wait()), load.summary()
    before = served(prefill[1])
    assert cluster.complete("abcdefghij" * 20)[0] == 200
    assert served(prefill[1]) > before
    for worker in (prefill[1], decode[1]):
        worker.stop()


@pytest.mark.skipif(gpu.present() and torch.cuda.device_count() < 2, reason="every rank needs a GPU of its own")
@pytest.mark.parametrize(
    ("flag", "processes"),
    [
        ("--tensor-parallel-size", ("VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1")),
        ("--data-parallel-size", ("VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1", "VLLM::DP")),
    ],
)
def test_two_ranks(cluster: Cluster, flag: str, processes: tuple[str, ...]) -> None:
    """Each rank works; the death of the last one is that of the worker."""
    worker, spare = cluster.serve(2, flag, "2", "--grace-period", "0")
    cluster.wait_routed(spare)
    for pattern in processes:
        assert worker.child(pattern)
    load = cluster.load(8, 1000)
    since = worker.signal(signal.SIGKILL, worker.child(processes[1]))
    assert worker.wait_gone(3) == 1
    print(f"gone after {time.monotonic() - since:.3f} s")
    assert "Fatal error kind=EngineDeadError" in worker.log
    assert all(result.ok for result in load.wait()), load.summary()
    tokens = by_rank(spare, "generation_tokens_total")
    assert all(tokens.values()), tokens
    spare.stop()


@pytest.mark.skipif(gpu.present() and torch.cuda.device_count() < 2, reason="every rank needs a GPU of its own")
def test_a_headless_node(cluster: Cluster) -> None:
    """Another node's ranks serve through the leader; the death of one ends its node's worker, with the reason."""
    flags = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--grace-period", "0"]
    flags += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())]
    node = cluster.start_worker(*flags, "--headless", "--data-parallel-start-rank", "1")
    (leader,) = cluster.serve(1, *flags)
    for _ in range(4):
        assert cluster.complete()[0] == 200
    served = by_rank(leader, "request_success_total")
    assert set(served) == {"0", "1"}
    assert all(served.values()), served
    node.wait_ready()
    assert cluster.models() == ["tiny"]
    node.signal(signal.SIGKILL, node.child("VLLM::EngineCore_DP1"))
    assert node.wait_gone(3) == 1
    assert "VLLM::EngineCor) died: killed by SIGKILL" in node.log
    leader.stop()


def by_rank(worker: Worker, name: str) -> dict[str, float]:
    """Return one of vLLM's metrics for each data-parallel rank."""
    sums: dict[str, float] = {}
    for line in worker.status("/metrics")[1].splitlines():
        sample = re.match(rf'vllm:{name}{{engine="(\d+)".*}} (\S+)$', line)
        if sample:
            sums[sample[1]] = sums.get(sample[1], 0.0) + float(sample[2])
    return sums
