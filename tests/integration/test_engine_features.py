"""The engine on the page of optional features does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.engines import echo
from dynamo_worker.testing import Cluster, Worker, eventually

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engine-features.md"


@pytest.fixture
def features(cluster: Cluster, tmp_path: Path) -> Cluster:
    """A cluster whose workers run the engine on the page."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "features.py").write_text("\n\n".join(blocks), encoding="utf-8")
    cluster.engine_args = ["-p", "features", "--engine", "features", "--model-path", str(echo.MODEL_DIR)]
    cluster.engine_args += ["--grace-period", "0"]
    cluster.model = "features"
    return cluster


def serve(features: Cluster, count: int, tmp_path: Path, *arguments: str, frontend: tuple[str, ...] = ()) -> Any:
    features.start_frontend(*frontend)
    workers = [features.start_worker(*arguments, PYTHONPATH=str(tmp_path)) for _ in range(count)]
    for worker in workers:
        worker.wait_ready()
    features.wait_model()
    return workers


def test_metrics_operations_and_adapters(features: Cluster, tmp_path: Path) -> None:
    worker: Worker
    (worker,) = serve(features, 1, tmp_path, "--control-load-root", str(tmp_path))
    assert features.ask(5, "Hello, world!").text == "Hello"
    assert worker.metric("features_requests_total") >= 1

    assert worker.operate("greet", {"name": "Ada"})["greeting"] == "Hello, Ada!"
    assert worker.operate("greet") == {"status": "error", "message": "name: expected a string"}

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").touch()
    body = {"lora_name": "mine", "source": {"uri": adapter.as_uri()}}
    assert worker.operate("load_lora", body)["status"] == "success"
    eventually(lambda: "mine" in features.models(), 10, "the adapter's model")
    assert worker.operate("unload_lora", {"lora_name": "mine"})["status"] == "success"
    eventually(lambda: "mine" not in features.models(), 10, "the end of the adapter's model")


def test_routers_find_what_its_kv_events_say(features: Cluster, tmp_path: Path) -> None:
    serve(features, 2, tmp_path, frontend=("--router-mode", "kv"))
    prompts = [str(number) * 200 for number in range(8)]
    for prompt in prompts:
        assert features.complete(prompt)[0] == 200

    def found() -> int:
        answers = [features.complete(prompt + "x")[1] for prompt in prompts]
        details = [answer["usage"].get("prompt_tokens_details") or {} for answer in answers]
        return sum(bool(detail.get("cached_tokens")) for detail in details)

    eventually(lambda: found() == len(prompts), 20, "every repeated prefix to be found in a cache")


def test_prefill_and_decode_on_different_workers(features: Cluster, tmp_path: Path) -> None:
    features.start_frontend()
    path = {"PYTHONPATH": str(tmp_path)}
    decode = features.start_worker("--disaggregation-mode", "decode", **path)
    prefill = features.start_worker("--disaggregation-mode", "prefill", **path)
    for worker in (decode, prefill):
        worker.wait_ready()
    features.wait_model()
    eventually(lambda: features.complete("Hello, world!", max_tokens=5)[0] == 200, 20, "an answer")
    assert features.complete("Hello, world!", max_tokens=5)[1]["choices"][0]["text"] == "Hello"
    assert prefill.metric("features_requests_total") >= 2
    assert decode.metric("features_requests_total") >= 2
