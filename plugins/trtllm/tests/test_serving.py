"""Whole workers behind the real frontend: what every engine has to show, and what only TensorRT-LLM has."""

from __future__ import annotations

import gzip
import json
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dynamo_worker.testing import Cluster, Subject, eventually, forward_passes
from dynamo_worker.testing.serving import Division, Metrics, Pause, Serving, needs_gpus

pytestmark = pytest.mark.timeout(300)

#: Ports on which Open MPI's processes wait for each other: the first free ones (`btl_tcp_port_min_v4`).
OPEN_MPI = range(1024, 1124)
TRANSCEIVER = ("--cache-transceiver-config", '{"backend": "DEFAULT"}')


class TestTrtllm(Serving):
    METRICS: ClassVar = Metrics(
        "trtllm_request_success_total",
        "trtllm_generation_tokens_total",
        "trtllm_num_requests_running",
        flags=("--publish-metrics", "--guided-decoding-backend", "xgrammar"),
    )
    REFUSED: ClassVar = (({"temperature": 1.0, "use_beam_search": True}, "use_beam_search"),)
    ADAPTERS: ClassVar = (
        "--enable-lora",
        *("--lora-config", '{"lora_target_modules": ["attn_q", "attn_v"], "max_lora_rank": 8}'),
    )
    PAUSES: ClassVar = (Pause("release_memory_occupation", "resume_memory_occupation", {"tags": ["kv_cache"]}),)
    KV_EVENTS: ClassVar = ("--publish-kv-events", "--kv-block-size", "16")

    @pytest.fixture
    def division(self) -> Division:
        """Let the KV cache go from one worker's rank to the other's."""
        flags = (*TRANSCEIVER, "--disaggregation-mode")
        return Division((*flags, "prefill"), (*flags, "decode"))

    @pytest.mark.parametrize("router", ["round-robin", "kv"])
    def test_all_is_on_loopback_with_a_frontend_there(self, cluster: Cluster, router: str) -> None:
        """All but the sockets of Open MPI, which listen on all interfaces whatever they are told."""
        published = self.KV_EVENTS if router == "kv" else ()
        worker = cluster.worker_with_frontend("--router-mode", router, *published)
        assert cluster.complete()[0] == 200
        listening = [each for each in worker.listening() if each.port not in OPEN_MPI and " orted " not in each.process]
        assert listening
        open_doors = [each for each in listening if not (each.local if router == "kv" else each.on_loopback)]
        assert not open_doors, open_doors
        worker.stop()

    def test_operations(self, cluster: Cluster, subject: Subject, tmp_path) -> None:  # type: ignore[no-untyped-def]
        worker = self.check_operations(cluster, subject, tmp_path, "--sleep-config", "{}")
        assert worker.operate("reset_prefix_cache")["status"] == "success"
        assert worker.operate("release_memory_occupation", {"tags": ["everything"]})["status"] == "error"
        worker.stop()

    def test_the_planner_sees_what_was_served(self, cluster: Cluster) -> None:
        worker = cluster.worker(DYN_FORWARDPASS_METRIC_PORT="20380")
        forward_passes.check_all(cluster, worker, r"mpi4py\.futures")

    def test_what_the_planner_sees_is_written_down(self, cluster: Cluster, tmp_path: Path) -> None:
        """The files stay when the worker has ended."""
        settings = {"DYN_FPM_OUTPUT_PATH": f"{tmp_path}/trace", "DYN_FPM_MODE": "full"}
        worker = cluster.worker("--fpm-trace", **settings)
        cluster.start_frontend()
        cluster.wait_model()
        assert cluster.complete(max_tokens=5)[0] == 200

        def passes() -> list[Any]:
            (path,) = tmp_path.glob("trace.*.jsonl.gz")
            with gzip.open(path, "rt") as lines:
                return [json.loads(line)["event"]["fpm"] for line in lines]

        def decodes() -> int:
            try:
                return sum(each["scheduled_requests"]["num_decode_requests"] for each in passes())
            except (ValueError, EOFError):  # the file is not there yet, or not written to the end
                return 0

        eventually(lambda: decodes() >= 4, 20, "the passes of a request to be written")
        worker.stop()
        counters = [each["counter_id"] for each in passes()]
        assert counters == list(range(counters[0], counters[0] + len(counters)))

    @needs_gpus(2)
    @pytest.mark.parametrize(
        "flags",
        [
            pytest.param((), id="tensor"),
            pytest.param(("--enable-attention-dp",), id="attention-dp", marks=pytest.mark.slow),
        ],
    )
    def test_two_ranks(self, cluster: Cluster, flags: tuple[str, ...]) -> None:
        """The death of one is that of the worker, whatever becomes of the others."""
        worker, spare = cluster.serve(2, "--tensor-parallel-size", "2", *flags)
        cluster.wait_routed(spare)
        ranks = [pid for pid, command in worker.children().items() if "mpi4py.futures" in command]
        assert len(ranks) == 2
        load = cluster.load(8, 500)
        since = worker.signal(signal.SIGKILL, ranks[-1])
        assert worker.wait_gone(5) == 1
        print(f"gone after {time.monotonic() - since:.3f} s")
        assert "Fatal error kind=EngineDeadError" in worker.log
        assert all(result.ok for result in load.wait()), load.summary()
        spare.stop()

    @needs_gpus(2)
    def test_kv_events_of_two_attention_ranks(self, cluster: Cluster) -> None:
        """The router finds a prefix on the rank that holds it."""
        flags = ("--tensor-parallel-size", "2", "--enable-attention-dp", *self.KV_EVENTS)
        (worker,) = cluster.serve(1, *flags, frontend=("--router-mode", "kv"))
        self.check_prefixes_are_found(cluster)
        worker.stop()
