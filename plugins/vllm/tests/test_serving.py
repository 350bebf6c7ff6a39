"""Whole workers behind the real frontend: what every engine has to show, and what only vLLM has."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from dynamo_worker.testing import Cluster, Subject, Worker, eventually, forward_passes
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.serving import Division, Metrics, Pause, Serving, needs_gpus
from dynamo_worker.testing.tiny_model import make


@pytest.mark.timeout(400)
class TestVllm(Serving):
    METRICS: ClassVar = Metrics(
        "vllm:request_success_total", "vllm:generation_tokens_total", "vllm:num_requests_running"
    )
    REFUSED: ClassVar = (({"n": 2}, "greedy"),)
    ADAPTERS: ClassVar = ("--enable-lora", "--max-lora-rank", "8")
    PAUSES: ClassVar = (Pause("sleep", "wake_up", {"level": 0}),)
    KV_EVENTS: ClassVar = ("--publish-kv-events", "--block-size", "32")

    @pytest.fixture
    def division(self, tmp_path: Path) -> Division:
        """Let workers share a folder."""
        transfer = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
        }
        flags = ("--kv-transfer-config", json.dumps(transfer), "--block-size", "32", "--disaggregation-mode")
        return Division((*flags, "prefill"), (*flags, "decode"))

    def test_prefill_here_and_decode_there(self, cluster: Cluster, division: Division, tmp_path: Path) -> None:
        super().test_prefill_here_and_decode_there(cluster, division)
        assert list((tmp_path / "kv").rglob("*.safetensors")), "nothing went through the folder"

    def test_operations(self, cluster: Cluster, subject: Subject, tmp_path: Path) -> None:
        worker = self.check_operations(cluster, subject, tmp_path)
        assert worker.operate("reset_prefix_cache")["status"] == "success"
        assert worker.operate("start_profile")["status"] == "error"  # vLLM was not told where to write
        worker.stop()

    @pytest.mark.slow  # `test_weight_updates.py` has each update on one engine
    def test_new_weights(self, cluster: Cluster, tmp_path: Path) -> None:
        """A worker whose update fails is out of service, and what it was answering ends on the other worker."""
        first, second = make(tmp_path / "first"), make(tmp_path / "second", seed=7)
        (tmp_path / "empty").mkdir()
        worker, other = cluster.serve(2, "--control-load-root", str(tmp_path), "--grace-period", "0")
        before = cluster.complete(max_tokens=64)[1]["choices"][0]["text"]
        refused = worker.operate("update_weights_from_distributed", {"names": []})
        assert "--enable-rl allows it" in refused["message"], refused
        refused = worker.operate("update_weights_from_disk", {"model_path": "/etc"})
        assert "not below a directory" in refused["message"], refused

        for model in (second, first):
            for each in (worker, other):
                assert each.operate("pause_generation")["status"] == "ok"
                answer = each.operate("update_weights_from_disk", {"model_path": str(model), "weight_version": "1"})
                assert answer["status"] in ("ok", "success"), answer
                assert each.operate("resume_generation")["status"] == "ok"
            cluster.wait_model()
            texts = {cluster.complete(max_tokens=64)[1]["choices"][0]["text"] for _ in range(4)}
            assert (texts == {before}) is (model == first), texts

        load = Load(cluster.url, [chat(cluster.model, "Hello, world!", 1000)] * 2)
        eventually(load.started, 60, "the first tokens")
        assert worker.operate("pause_generation")["status"] == "ok"
        answer = worker.operate("update_weights_from_disk", {"model_path": str(tmp_path / "empty")})
        assert answer["status"] == "error", answer
        assert all(result.ok for result in load.wait()), load.results
        assert {cluster.complete(max_tokens=64)[1]["choices"][0]["text"] for _ in range(4)} == {before}
        assert worker.operate("get_weight_version")["version"] == "1"
        assert "Weight update failed; the worker serves nothing" in worker.log
        other.stop()
        worker.stop()

    @needs_gpus(2)
    def test_two_ranks_with_a_frontend_there(self, cluster: Cluster) -> None:
        """All is on loopback, and the death of a rank is the worker's."""
        worker = self.check_loopback(cluster, "kv", "--data-parallel-size", "2")
        # What the ranks tell of prompts goes over files: each listens, and somebody is connected.
        sockets = re.findall(rf"{worker.run_dir}/kv-events\S*", Path("/proc/net/unix").read_text())
        assert sorted(Counter(sockets).values()) == [2, 2], sockets
        worker.signal(signal.SIGKILL, worker.child("VLLM::EngineCore_DP1"))
        assert worker.wait_gone(15) == 1
        assert "Fatal error kind=EngineDeadError" in worker.log

    @needs_gpus(2)
    @pytest.mark.parametrize(
        ("flag", "processes"),
        [
            pytest.param(
                "--tensor-parallel-size",
                ("VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"),
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "--data-parallel-size",
                ("VLLM::DP", "VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"),
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_two_ranks(self, cluster: Cluster, subject: Subject, flag: str, processes: tuple[str, ...]) -> None:
        spare = self.check_ranks(cluster, subject, flag, "2", processes=processes)
        tokens = by_rank(spare, "generation_tokens_total")
        assert all(tokens.values()), tokens
        spare.stop()

    @pytest.mark.parametrize(
        "flag", ["--async-scheduling", pytest.param("--no-async-scheduling", marks=pytest.mark.slow)]
    )
    def test_the_planner_sees_what_was_served(self, cluster: Cluster, flag: str) -> None:
        """Also long prompts, which are computed in parts, and after the engine has died."""
        environment = {"DYN_FORWARDPASS_METRIC_PORT": "20380"}
        worker = cluster.worker("--max-num-batched-tokens", "64", flag, **environment)
        forward_passes.check_all(cluster, worker, "VLLM::EngineCore")

    @pytest.mark.slow
    @needs_gpus(2)
    def test_the_planner_sees_every_rank(self, cluster: Cluster) -> None:
        worker = cluster.worker("--data-parallel-size", "2", DYN_FORWARDPASS_METRIC_PORT="20380")
        forward_passes.check_all(cluster, worker, "VLLM::EngineCore_DP1", (0, 1))

    @needs_gpus(2)
    def test_a_headless_node(self, cluster: Cluster) -> None:
        """Another node's ranks serve through the leader; the death of one ends its node's worker, with the reason."""
        flags = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
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
        assert node.wait_gone(15) == 1
        assert "VLLM::EngineCor) died: killed by SIGKILL" in node.log
        leader.stop()


def by_rank(worker: Worker, name: str) -> dict[str, float]:
    """Return one of vLLM's metrics for each data-parallel rank."""
    sums: dict[str, float] = {}
    for line in worker.status("/metrics")[1].splitlines():
        sample = re.match(rf'vllm:{name}{{.*\bengine="(\d+)".*}} (\S+)$', line)
        if sample:
            sums[sample[1]] = sums.get(sample[1], 0.0) + float(sample[2])
    return sums
