"""Whole workers behind the real frontend: answers, operations, KV-aware routing, divided requests, ranks, nodes."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from dynamo_worker.testing import Cluster, Load, Worker, eventually
from dynamo_worker.testing.client import chat
from dynamo_worker.testing.cluster import free_port

pytestmark = pytest.mark.timeout(300)

QUICK = ("--grace-period", "0")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return the directory of a LoRA adapter that changes every answer."""
    from dynamo_worker.testing.tiny_model import make_adapter

    return make_adapter(tmp_path / "adapter")


def test_answers(cluster: Cluster) -> None:
    (worker,) = cluster.serve(1, *QUICK, "--enable-metrics")
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
    assert answer["usage"]["completion_tokens"] == 24

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, answer = cluster.chat(response_format=answer_format, max_tokens=200, temperature=1.0)
    assert status == 200, answer
    text = answer["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{"), text

    status, answer = cluster.complete(min_tokens=6, max_tokens=6, temperature=1.0)
    assert answer["usage"]["completion_tokens"] == 6, answer

    for wrong, message in (
        ({"prompt": "a " * 3000}, "context"),
        ({"temperature": 1.0, "seed": 1}, "seed"),
        ({"temperature": 0.5, "best_of": 3}, "best_of"),
    ):
        status, answer = cluster.complete(**wrong)
        assert 400 <= status < 500, (wrong, answer)
        assert message in json.dumps(answer), (wrong, answer)
    assert cluster.complete()[0] == 200

    code, metrics = worker.status("/metrics")
    assert code == 200
    for name in ("sglang:num_requests_total", "sglang:generation_tokens_total", "sglang:num_running_reqs"):
        assert name in metrics
    worker.stop()


def test_a_cancelled_request_leaves_the_engine(cluster: Cluster) -> None:
    """The stream of a client that goes away ends inside the engine, at once."""
    (worker,) = cluster.serve(1, *QUICK, "--enable-metrics")
    load = Load(cluster.url, [chat("tiny", "The quick brown fox", 3000)], timeout=1.0)
    eventually(lambda: load.started(), 10, "the stream")
    load.wait()
    assert worker.metric("sglang:num_aborted_requests_total") == 1
    eventually(lambda: worker.metric("dynamo_worker_in_flight") == 0, 5, "the request to leave the worker")
    eventually(lambda: worker.metric("sglang:num_running_reqs") == 0, 5, "the request to leave the scheduler")
    worker.stop()


def test_operations(cluster: Cluster, adapter: Path, model: Path) -> None:
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "v_proj")
    lora += ("--lora-paths", f"preloaded={adapter}")
    if not torch.cuda.is_available():
        lora += ("--lora-backend", "torch_native")
    (worker,) = cluster.serve(1, *QUICK, *lora)
    plain = cluster.complete()[1]["choices"][0]["text"]

    assert set(cluster.models()) == {"tiny", "preloaded"}
    preloaded = cluster.complete(model="preloaded")[1]["choices"][0]["text"]
    assert preloaded != plain
    load = {"lora_name": "adapted", "source": {"uri": f"file://{adapter}"}}
    assert worker.operate("load_lora", load)["status"] == "success", worker.log[-3000:]
    assert worker.operate("list_loras")["count"] == 2
    eventually(lambda: "adapted" in cluster.models(), 10, "the adapter in /v1/models")
    status, answer = cluster.complete(model="adapted")
    assert status == 200, answer
    assert answer["choices"][0]["text"] == preloaded
    assert cluster.complete()[1]["choices"][0]["text"] == plain
    assert worker.operate("unload_lora", {"lora_name": "adapted"})["status"] == "success"
    eventually(lambda: "adapted" not in cluster.models(), 10, "the adapter to leave /v1/models")

    assert worker.operate("flush_cache")["status"] == "success"

    for away, back in (
        ("pause_generation", "continue_generation"),
        ("release_memory_occupation", "resume_memory_occupation"),
    ):
        assert worker.operate(away)["status"] == "success", worker.log[-3000:]
        eventually(lambda: not cluster.models(), 10, "the worker to leave discovery")
        assert worker.operate(back)["status"] == "success", worker.log[-3000:]
        cluster.wait_model()
        eventually(lambda: cluster.complete()[0] == 200, 10, "an answer afterwards")

    assert worker.operate("pause_generation", {"mode": "soon"})["status"] == "error"
    assert worker.operate("update_weights_from_disk", {"model_path": "/nowhere"})["status"] == "error"
    update = worker.operate("update_weights_from_disk", {"model_path": str(model), "weight_version": "2"})
    assert update["status"] == "success", update
    assert cluster.complete()[1]["choices"][0]["text"] == plain

    profile = {"output_dir": str(cluster.tmp / "profile"), "activities": ["CPU"]}
    assert worker.operate("start_profile", profile)["status"] == "success"
    assert cluster.complete()[0] == 200
    assert worker.operate("stop_profile")["status"] == "success"
    assert list((cluster.tmp / "profile").iterdir())
    worker.stop()
    for path in (cluster.tmp / "profile").iterdir():
        path.unlink()
    (cluster.tmp / "profile").rmdir()


def test_a_repeated_prefix_goes_to_the_worker_that_holds_it(cluster: Cluster) -> None:
    flags = (*QUICK, "--publish-kv-events", "--page-size", "16", "--enable-metrics")
    workers = cluster.serve(2, *flags, frontend=("--router-mode", "kv"))
    prompts = [str(number) * 200 for number in range(8)]
    for prompt in prompts:
        assert cluster.complete(prompt)[0] == 200

    def hits() -> int:
        answers = [cluster.complete(prompt + "x")[1] for prompt in prompts]
        details = [answer["usage"].get("prompt_tokens_details") or {} for answer in answers]
        return sum(bool(detail.get("cached_tokens")) for detail in details)

    eventually(lambda: hits() == len(prompts), 20, "every repeated prefix to be found in a cache")
    served = [worker.metric("sglang:num_requests_total") for worker in workers]
    assert all(served), f"one worker got everything: {served}"
    for worker in workers:
        worker.stop()


def test_a_scheduler_that_fails_by_itself(cluster: Cluster) -> None:
    """It reports an exception with a signal that would end this process by default."""
    cluster.start_frontend()
    worker = cluster.start_worker(*QUICK, SGLANG_TEST_CRASH_AFTER_STREAM_OUTPUTS="300").wait_ready()
    spare = cluster.start_worker(*QUICK).wait_ready()
    for each in (worker, spare):
        cluster.wait_routed(each)
    load = cluster.load(8, 800)
    assert worker.wait_gone() == 1
    assert "Test crash" in worker.log
    assert 'Fatal error kind=EngineDeadError error="a process of SGLang reports that it has failed"' in worker.log
    assert all(result.ok for result in load.wait()), load.summary()
    spare.stop()


def mooncake() -> bool:
    """Return whether the library is there that moves KV caches over TCP, for which no accelerator is needed."""
    try:
        import mooncake.engine  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not mooncake(), reason="needs mooncake-transfer-engine and libibverbs")
def test_prefill_here_and_decode_there(cluster: Cluster) -> None:
    """The KV cache goes from one process to the other; one of each kind is killed with requests in flight."""
    flags = (*QUICK, "--disaggregation-transfer-backend", "mooncake", "--enable-metrics")
    environment = {"MC_FORCE_TCP": "1", "SGLANG_HOST_IP": "127.0.0.1", "MC_LOG_LEVEL": "WARNING"}
    decode_flags = ("--disaggregation-mode", "decode", "--disaggregation-decode-retraction-backup", "cpu_tensor")
    prefill_flags = ("--disaggregation-mode", "prefill", "--component", "prefill")
    cluster.start_frontend()
    decode = [cluster.start_worker(*flags, *decode_flags, **environment) for _ in range(2)]
    prefill = [cluster.start_worker(*flags, *prefill_flags, **environment) for _ in range(2)]
    for worker in (*decode, *prefill):
        worker.wait_ready()
    cluster.wait_model()
    eventually(lambda: cluster.chat()[0] == 200, 20, "an answer")

    def served(worker: Worker) -> float:
        return worker.metric("sglang:num_requests_total")

    before = [served(worker) for worker in (*prefill, *decode)]
    for number in range(4):
        status, answer = cluster.complete(f"{number}23456789" * 20, max_tokens=20)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 20
    after = [served(worker) for worker in (*prefill, *decode)]
    assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)

    load = cluster.load(8, 1000, prompt="0123456789" * 20)
    assert decode[0].metric("dynamo_worker_in_flight") > 0
    decode[0].signal(signal.SIGKILL, decode[0].worker_pid)
    assert decode[0].wait_gone() == 128 + signal.SIGKILL
    assert all(result.ok for result in load.wait()), load.summary()
    prefill[0].stop()
    assert cluster.complete("abcdefghij" * 20)[0] == 200
    for worker in (prefill[1], decode[1]):
        worker.stop()


def test_a_decode_worker_by_itself(cluster: Cluster) -> None:
    """It starts and warms up without a prefill worker, with SGLang's own stand-in for a transfer."""
    fake = ("--disaggregation-transfer-backend", "fake", "--disaggregation-decode-retraction-backup", "cpu_tensor")
    cluster.start_worker(*QUICK, "--disaggregation-mode", "decode", *fake).wait_ready().stop()


@pytest.mark.parametrize("flag", ["--tp-size", "--dp-size"])
@pytest.mark.slow
def test_two_ranks(cluster: Cluster, flag: str) -> None:
    """Each rank works; the death of the last one is that of the worker."""
    cluster.start_frontend()
    # One core for each rank; by default SGLang wants a NUMA node for each.
    worker, spare = (cluster.start_worker(*QUICK, flag, "2", SGLANG_CPU_OMP_THREADS_BIND="0|1") for _ in range(2))
    for each in (worker, spare):
        each.wait_ready()
    cluster.wait_routed(spare)
    ranks = [pid for pid, command in worker.children().items() if re.search("sglang::scheduler", command)]
    assert len(ranks) == 2
    load = cluster.load(8, 500)
    since = worker.signal(signal.SIGKILL, ranks[1])
    assert worker.wait_gone(10) == 1
    print(f"gone after {time.monotonic() - since:.3f} s")
    assert all(result.ok for result in load.wait()), load.summary()
    spare.stop()


def test_two_nodes(cluster: Cluster) -> None:
    """The second node is ready after the first one, ends when it is asked to, and each ends with the other."""
    address = f"127.0.0.1:{free_port()}"
    flags = (*QUICK, "--tp-size", "2", "--nnodes", "2", "--dist-init-addr", address)
    cluster.start_frontend()

    def start(rank: int) -> Worker:
        return cluster.start_worker(*flags, "--node-rank", str(rank), SGLANG_CPU_OMP_THREADS_BIND="0|1")

    second = start(1)
    second.wait_log("Init parallel begin", 60)
    assert second.status("/health")[0] == 503
    since = second.signal(signal.SIGTERM)
    assert second.wait_gone(9) == 0
    print(f"gone after {time.monotonic() - since:.3f} s")

    for dies in (1, 0):
        second, first = start(1), start(0)
        ready = False
        while second.status("/health")[0] != 200:
            ready = first.status("/health")[0] == 200
            time.sleep(0.05)
        assert ready, "the second node was ready before the first one"
        cluster.wait_model()
        assert cluster.complete()[0] == 200
        nodes = [first, second]
        since = nodes[dies].signal(signal.SIGKILL, nodes[dies].child("sglang::scheduler"))
        for node in (nodes.pop(dies), *nodes):
            assert node.wait_gone(10) == 1
            assert "Fatal error kind=EngineDeadError" in node.log
            print(f"node {node is second:d} gone after {time.monotonic() - since:.3f} s")
