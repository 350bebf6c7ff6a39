"""Whole workers behind the real frontend: what every engine has to show, and what only SGLang has."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from dynamo_worker.testing import Cluster, Subject, Worker, eventually, forward_passes
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.serving import Division, Metrics, Pause, Serving, needs_gpus
from dynamo_worker.testing.tiny_model import make, make_adapter

pytestmark = pytest.mark.timeout(300)

QUICK = ("--grace-period", "0")


def mooncake() -> bool:
    """Return whether the library is there that moves KV caches over TCP, for which no accelerator is needed."""
    try:
        import mooncake.engine  # noqa: F401
    except ImportError:
        return False
    return True


class TestSglang(Serving):
    METRICS: ClassVar = Metrics(
        "sglang:num_requests_total",
        "sglang:generation_tokens_total",
        "sglang:num_running_reqs",
        flags=("--enable-metrics",),
    )
    REFUSED: ClassVar = (({"temperature": 1.0, "seed": 1}, "seed"),)
    ADAPTERS: ClassVar = (
        *("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "v_proj"),
        *(() if torch.cuda.is_available() else ("--lora-backend", "torch_native")),
    )
    PAUSES: ClassVar = (
        Pause("pause_generation", "continue_generation"),
        Pause("release_memory_occupation", "resume_memory_occupation"),
    )
    KV_EVENTS: ClassVar = ("--publish-kv-events", "--page-size", "16")
    HOST: ClassVar = ("--host", "0.0.0.0")  # as usual launch scripts have it

    @pytest.fixture
    def division(self, monkeypatch: pytest.MonkeyPatch) -> Division:
        """Let the KV cache go from one process to the other."""
        if not mooncake():
            pytest.skip("needs mooncake-transfer-engine and libibverbs")
        for name, value in {"MC_FORCE_TCP": "1", "SGLANG_HOST_IP": "127.0.0.1", "MC_LOG_LEVEL": "WARNING"}.items():
            monkeypatch.setenv(name, value)
        flags = ("--disaggregation-transfer-backend", "mooncake", "--disaggregation-mode")
        return Division(
            (*flags, "prefill"), (*flags, "decode", "--disaggregation-decode-retraction-backup", "cpu_tensor")
        )

    @pytest.mark.slow
    def test_a_decode_worker_by_itself(self, cluster: Cluster) -> None:
        """It starts and warms up without a prefill worker, with SGLang's own stand-in for a transfer."""
        fake = ("--disaggregation-transfer-backend", "fake", "--disaggregation-decode-retraction-backup", "cpu_tensor")
        cluster.start_worker("--disaggregation-mode", "decode", *fake).wait_ready().stop()

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
                answer = each.operate("update_weights_from_disk", {"model_path": str(model), "weight_version": "1"})
                assert answer["status"] in ("ok", "success"), answer
            cluster.wait_model()
            texts = {cluster.complete(max_tokens=64)[1]["choices"][0]["text"] for _ in range(4)}
            assert (texts == {before}) is (model == first), texts

        load = Load(cluster.url, [chat(cluster.model, "Hello, world!", 1000)] * 2)
        eventually(load.started, 60, "the first tokens")
        assert worker.operate("pause_generation", {"mode": "in_place"})["status"] == "success"
        body = {"model_path": str(tmp_path / "empty"), "flush_cache": False}
        answer = worker.operate("update_weights_from_disk", body)
        assert answer["status"] == "error", answer
        assert all(result.ok for result in load.wait()), load.results
        assert {cluster.complete(max_tokens=64)[1]["choices"][0]["text"] for _ in range(4)} == {before}
        assert worker.operate("get_weight_version")["version"] == "1"
        assert "Weight update failed; the worker serves nothing" in worker.log
        other.stop()
        worker.stop()

    def test_operations(self, cluster: Cluster, subject: Subject, tmp_path: Path, tiny_model: Path) -> None:
        preloaded = make_adapter(tmp_path / "preloaded")
        flags = ("--lora-paths", f"preloaded={preloaded}", "--control-load-root", str(tiny_model))
        worker = self.check_operations(cluster, subject, tmp_path, *flags)
        assert worker.operate("flush_cache")["status"] == "success"
        assert worker.operate("pause_generation", {"mode": "soon"})["status"] == "error"
        self.check_two_reasons_at_once(cluster, worker)

        plain = cluster.complete()[1]["choices"][0]["text"]
        assert set(cluster.models()) == {"tiny", "preloaded"}
        assert cluster.complete(model="preloaded")[1]["choices"][0]["text"] != plain
        for path in ("/nowhere", f"{tiny_model}/nowhere"):
            assert worker.operate("update_weights_from_disk", {"model_path": path})["status"] == "error"
        update = worker.operate("update_weights_from_disk", {"model_path": str(tiny_model), "weight_version": "2"})
        assert update["status"] == "success", update
        # It was out of discovery meanwhile.
        eventually(lambda: cluster.complete()[0] == 200, 10, "an answer afterwards")
        assert cluster.complete()[1]["choices"][0]["text"] == plain

        profile = {"output_dir": str(tmp_path / "profile"), "activities": ["CPU"]}
        assert worker.operate("start_profile", profile)["status"] == "success"
        assert cluster.complete()[0] == 200
        assert worker.operate("stop_profile")["status"] == "success"
        assert list((tmp_path / "profile").iterdir())
        worker.stop()

    def check_two_reasons_at_once(self, cluster: Cluster, worker: Worker) -> None:
        """The engine is back when it is neither paused nor without any of its memory."""
        assert worker.operate("pause_generation", {"mode": "in_place"})["status"] == "success"
        assert "in place" in worker.operate("release_memory_occupation")["message"]
        assert worker.operate("continue_generation")["status"] == "success"
        for name, body, message in (
            ("pause_generation", {}, "generation paused"),
            ("release_memory_occupation", {"tags": ["kv_cache"]}, "memory released"),
            ("release_memory_occupation", {}, "memory released"),
            ("release_memory_occupation", {"tags": ["weights"]}, "already released"),
            ("continue_generation", {}, "when memory is resumed"),
            ("resume_memory_occupation", {"tags": ["weights"]}, "still released"),
        ):
            assert message in worker.operate(name, body)["message"]
            assert not cluster.models()
        assert worker.operate("resume_memory_occupation")["status"] == "success"
        cluster.wait_model()
        eventually(lambda: cluster.complete()[0] == 200, 10, "an answer when all of it is back")

    def test_the_planner_sees_what_was_served(self, cluster: Cluster) -> None:
        worker = cluster.worker(DYN_FORWARDPASS_METRIC_PORT="20380")
        forward_passes.check_all(cluster, worker, "sglang::scheduler")

    @pytest.mark.slow
    @needs_gpus(2)
    def test_the_planner_sees_every_rank(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # a core for each; otherwise a NUMA node
        worker = cluster.worker("--dp-size", "2", "--enable-forward-pass-metrics")  # SGLang's own flag
        forward_passes.check_all(cluster, worker, "sglang::scheduler_DP1", (0, 1))

    def test_a_scheduler_that_fails_by_itself(self, cluster: Cluster) -> None:
        """It reports an exception with a signal that would end this process by default."""
        cluster.start_frontend()
        worker = cluster.start_worker(SGLANG_TEST_CRASH_AFTER_STREAM_OUTPUTS="300").wait_ready()
        spare = cluster.start_worker().wait_ready()
        for each in (worker, spare):
            cluster.wait_routed(each)
        load = cluster.load(8, 800)
        assert worker.wait_gone() == 1
        assert "Test crash" in worker.log
        assert 'Fatal error kind=EngineDeadError error="a process of SGLang reports that it has failed"' in worker.log
        assert all(result.ok for result in load.wait()), load.summary()
        spare.stop()

    @needs_gpus(2)
    @pytest.mark.parametrize(
        ("flag", "processes"),
        [
            pytest.param("--tp-size", ("sglang::scheduler_TP0", "sglang::scheduler_TP1"), marks=pytest.mark.slow),
            pytest.param("--dp-size", ("sglang::scheduler_DP0", "sglang::scheduler_DP1"), marks=pytest.mark.slow),
        ],
    )
    def test_two_ranks(
        self,
        cluster: Cluster,
        subject: Subject,
        monkeypatch: pytest.MonkeyPatch,
        flag: str,
        processes: tuple[str, ...],
    ) -> None:
        # One core for each rank; by default SGLang wants a NUMA node for each.
        monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        self.check_ranks(cluster, subject, flag, "2", processes=processes).stop()


@needs_gpus(2)
@pytest.mark.parametrize("dies", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_two_nodes(cluster: Cluster, dies: int) -> None:
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
