"""Metrics beside vLLM's own: those of what plugs into its processes, and the hit rate of its prefix cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from dynamo_worker.testing import Cluster
from dynamo_worker_vllm import load
from dynamo_worker_vllm.runtime_data import runtime_data

TRANSFER = {
    "kv_connector": "CountingConnector",
    "kv_connector_module_path": "counting_connector",
    "kv_role": "kv_both",
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("operators", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_plugs_into_vllms_processes(cluster: Cluster, tmp_path: Path, operators: bool) -> None:
    """Its metrics are in files; those that an earlier worker left in the operator's directory do not count."""
    directory = tmp_path / "metrics"
    extra = {"shared_storage_path": str(tmp_path / "kv")}
    variables = {"PYTHONPATH": os.fspath(Path(__file__).parent)}
    if operators:
        directory.mkdir()
        variables["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    cluster.start_frontend()
    worker = cluster.worker(
        "--kv-transfer-config", json.dumps({**TRANSFER, "kv_connector_extra_config": extra}), **variables
    )
    cluster.wait_model()
    assert cluster.chat()[0] == 200
    if operators:
        (own, *_) = [path for path in directory.iterdir() if path.name.startswith("counter_")]
        (directory / "counter_1.db").write_bytes(own.read_bytes())
        ours = [path for path in directory.iterdir() if path.name.endswith(f"_{worker.worker_pid}.db")]
        assert not ours, "the worker's own metrics are in memory"
    else:
        directory = worker.run_dir / "prometheus"
        assert any(directory.iterdir())
    assert worker.metric("lmcache:toy_connectors_total") == 2, "the scheduler's and the worker's"
    (line, *_) = [
        line for line in worker.status("/metrics")[1].splitlines() if line.startswith("lmcache:toy_connectors_total")
    ]
    assert 'dynamo_component="backend"' in line
    assert worker.metric("dynamo_component_kv_cache_hit_rate") >= 0
    worker.stop()
    assert directory.exists() is operators


def test_hit_rates_are_those_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()  # that of this process may have vLLM's own, of an engine in an earlier test
    monkeypatch.setattr(load, "REGISTRY", registry)
    names = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    queries, hits = (Counter(name, name, ["model_name", "engine"], registry=registry) for name in names)
    assert load.hit_rates() == {}
    queries.labels("tiny", "0").inc(8)
    queries.labels("tiny", "1").inc(4)
    queries.labels("tiny", "2").inc(0)
    hits.labels("tiny", "1").inc(3)
    assert load.hit_rates() == {0: 0.0, 1: 0.75}


def settings(parser: str = "", speculative: Any = None, **outputs: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=2048),
        structured_outputs_config=SimpleNamespace(
            **{"reasoning_parser": parser, "enable_in_reasoning": False} | outputs
        ),
        speculative_config=speculative,
    )


def test_what_is_published_with_the_model() -> None:
    assert runtime_data(settings(), None) == {
        "token_budget": {"combined_limit": 2048, "reject_prompt_overflow": True, "reject_total_overflow": False},
        "tool_call_structural_tag_excludes_reasoning": False,
    }


@pytest.mark.parametrize(
    ("parser", "inside", "expected"), [("qwen3", False, True), ("qwen3", True, False), ("", False, False)]
)
def test_whether_grammars_begin_after_the_reasoning(parser: str, inside: bool, expected: bool) -> None:
    data = runtime_data(settings(parser, enable_in_reasoning=inside), 1)
    assert data["tool_call_structural_tag_excludes_reasoning"] is expected
    assert data["stream_interval"] == 1


@pytest.mark.parametrize(
    ("speculative", "expected"),
    [
        ((3, "ngram"), {"nextn": 3, "source": "backend_config", "method": "ngram"}),
        ((3, None), {"nextn": 3, "source": "backend_config"}),
        ((None, "ngram"), None),
    ],
)
def test_speculative_decoding(speculative: tuple[int | None, str | None], expected: Any) -> None:
    tokens, method = speculative
    given = SimpleNamespace(num_speculative_tokens=tokens, method=method)
    assert runtime_data(settings(speculative=given), None).get("spec_decode") == expected
