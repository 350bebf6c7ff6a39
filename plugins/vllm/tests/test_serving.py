"""Whole workers behind the real frontend: answers, adapters, sleep, KV-aware routing, divided requests, ranks."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.testing import Cluster, Worker, eventually

START = 180.0
pytestmark = pytest.mark.timeout(400)


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def complete(cluster: Cluster, prompt: str = "The quick brown fox", **options: Any) -> tuple[int, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, **options}
    return post(f"{cluster.url}/v1/completions", body)


def chat(cluster: Cluster, **options: Any) -> tuple[int, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **options}
    return post(f"{cluster.url}/v1/chat/completions", body)


def operate(worker: Worker, name: str, body: dict[str, Any] | None = None) -> Any:
    return post(f"http://127.0.0.1:{worker.status_port}/engine/{name}", body or {})[1]


def serve(cluster: Cluster, *arguments: str, frontend: tuple[str, ...] = ()) -> Worker:
    cluster.model = "tiny"
    cluster.start_frontend(*frontend)
    worker = cluster.start_worker("--grace-period", "0", *arguments).wait_ready(START)
    cluster.wait_model()
    return worker


def stop(worker: Worker) -> None:
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0, worker.log[-3000:]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return the directory of a LoRA adapter that changes every answer."""
    import torch
    from safetensors.torch import save_file

    directory = tmp_path / "adapter"
    directory.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 64)
            tensors[f"{name}.lora_B.weight"] = torch.randn(64, 8)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return directory


def test_answers(cluster: Cluster) -> None:
    worker = serve(cluster)
    status, answer = chat(cluster)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"
    # greedy, by the model's own generation configuration
    assert chat(cluster)[1]["choices"][0]["message"] == answer["choices"][0]["message"]

    status, answer = chat(cluster, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["logprob"] <= 0 for entry in content)

    status, answer = complete(cluster, n=3, temperature=1.0)
    assert status == 200
    assert {choice["index"] for choice in answer["choices"]} == {0, 1, 2}

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, answer = chat(cluster, response_format=answer_format, max_tokens=200, temperature=1.0)
    assert status == 200, answer
    text = answer["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{"), text

    for wrong, message in (
        ({"prompt": "a " * 3000}, "context"),
        ({"n": 2}, "greedy"),
        ({"temperature": 0.5, "best_of": 3}, "best_of"),
    ):
        status, answer = complete(cluster, **wrong)
        assert 400 <= status < 500, (wrong, answer)
        assert message in json.dumps(answer), (wrong, answer)
    assert complete(cluster)[0] == 200

    code, metrics = worker.status("/metrics")
    assert code == 200
    assert "vllm:generation_tokens_total" in metrics
    stop(worker)


def test_operations(cluster: Cluster, adapter: Path) -> None:
    worker = serve(cluster, "--enable-lora", "--max-lora-rank", "8")
    plain = complete(cluster)[1]["choices"][0]["text"]

    assert (
        "adapter_config" in operate(worker, "load_lora", {"lora_name": "x", "source": {"uri": "/nowhere"}})["message"]
    )
    load = {"lora_name": "adapted", "source": {"uri": f"file://{adapter}"}}
    assert operate(worker, "load_lora", load)["status"] == "success"
    assert operate(worker, "load_lora", load)["status"] == "success"
    assert operate(worker, "list_loras")["count"] == 1
    eventually(lambda: "adapted" in cluster.models(), 10, "the adapter in /v1/models")
    status, answer = complete(cluster, model="adapted")
    assert status == 200, answer
    assert answer["choices"][0]["text"] != plain
    assert complete(cluster)[1]["choices"][0]["text"] == plain
    assert operate(worker, "unload_lora", {"lora_name": "adapted"})["status"] == "success"
    eventually(lambda: "adapted" not in cluster.models(), 10, "the adapter to leave /v1/models")

    assert operate(worker, "reset_prefix_cache")["status"] == "success"
    assert operate(worker, "start_profile")["status"] == "error"  # vLLM was not told where to write

    assert operate(worker, "sleep", {"level": 0})["status"] == "success"
    eventually(lambda: not cluster.models(), 10, "the sleeping worker to leave discovery")
    assert operate(worker, "wake_up")["status"] == "success"
    cluster.wait_model()
    eventually(lambda: complete(cluster)[0] == 200, 10, "an answer after waking up")
    stop(worker)


def test_a_repeated_prefix_goes_to_the_worker_that_holds_it(cluster: Cluster) -> None:
    flags = ("--publish-kv-events", "--block-size", "32")
    first = serve(cluster, *flags, frontend=("--router-mode", "kv"))
    second = cluster.start_worker("--grace-period", "0", *flags).wait_ready(START)
    prompts = [str(number) * 200 for number in range(8)]
    for prompt in prompts:
        assert complete(cluster, prompt)[0] == 200

    def hits() -> int:
        return sum(
            bool((complete(cluster, prompt + "x")[1]["usage"].get("prompt_tokens_details") or {}).get("cached_tokens"))
            for prompt in prompts
        )

    eventually(lambda: hits() == len(prompts), 20, "every repeated prefix to be found in a cache")
    served = [requests_of(worker) for worker in (first, second)]
    assert all(served), f"one worker got everything: {served}"
    stop(first)
    stop(second)


def requests_of(worker: Worker) -> float:
    """Return the number of requests that ended on a worker."""
    lines = worker.status("/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total"))


@pytest.fixture
def divided(cluster: Cluster, tmp_path: Path) -> tuple[Worker, Worker]:
    """Return a prefill worker and a decode worker that share a folder."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
    }
    flags = ("--kv-transfer-config", json.dumps(transfer), "--block-size", "32", "--grace-period", "0")
    cluster.model = "tiny"
    cluster.start_frontend()
    decode = cluster.start_worker("--disaggregation-mode", "decode", *flags)
    decode.wait_ready(START)
    prefill = cluster.start_worker("--disaggregation-mode", "prefill", "--component", "prefill", *flags)
    prefill.wait_ready(START)
    cluster.wait_model()
    return prefill, decode


def test_prefill_here_and_decode_there(cluster: Cluster, divided: tuple[Worker, Worker], tmp_path: Path) -> None:
    prefill, decode = divided
    before = requests_of(prefill), requests_of(decode)
    eventually(lambda: chat(cluster)[0] == 200, 20, "an answer")
    status, answer = complete(cluster, "0123456789" * 20, max_tokens=20)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 20
    assert requests_of(prefill) > before[0], prefill.log[-2000:]
    assert requests_of(decode) > before[1]
    assert list((tmp_path / "kv").rglob("*.safetensors")), "nothing went through the folder"
    stop(prefill)
    stop(decode)
