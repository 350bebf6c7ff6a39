"""The fault table on TensorRT-LLM's processes, and what only they can do: real `orted`, real ranks, real frontend."""

from __future__ import annotations

import signal
import time

import pytest

from conftest import DAEMON, STANDIN
from dynamo_worker.testing import Cluster, Subject, Worker, eventually
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.fault_table import FaultTable

pytestmark = pytest.mark.timeout(400)

QUICK = ("--grace-period", "0")
needs_switches = pytest.mark.skipif(not STANDIN, reason="only the stand-in can be made to do this")


class TestTrtllm(FaultTable):
    pass


class TestDaemon:
    """Open MPI's `orted`: without it no rank can start, but those that run need it for nothing until they end."""

    def test_killed(self, cluster: Cluster, subject: Subject) -> None:
        """Open MPI would end the worker a second later with a code of its own, 205."""
        worker, spare = cluster.serve(2)
        cluster.wait_routed(spare)
        for victim in (worker, spare):  # one is busy, the other idle
            load = cluster.load(8, subject.stream_tokens) if victim is worker else None
            since = victim.signal(signal.SIGKILL, victim.child(DAEMON))
            eventually(lambda victim=victim: not victim.registered, 3, "the worker to leave discovery")
            left = time.monotonic() - since
            assert victim.wait_gone(3) == 1
            print(f"out of discovery after {left:.3f} s, gone after {time.monotonic() - since:.3f} s")
            assert "(orted) died" in victim.log
            if load is not None:
                assert all(result.ok for result in load.wait()), load.summary()

    def test_stopped(self, cluster: Cluster) -> None:
        """The worker serves on, and ends as ever: the supervisor ends what cannot end by itself."""
        (worker,) = cluster.serve(1, "--stall-timeout", "4", *QUICK)
        daemon = worker.child(DAEMON)
        worker.signal(signal.SIGSTOP, daemon)
        until = time.monotonic() + 6
        while time.monotonic() < until:
            assert cluster.complete()[0] == 200
        worker.stop()


@needs_switches
class TestRanks:
    """What a rank can do to itself, in mid-serving."""

    @pytest.mark.parametrize(
        "kind",
        ["raise", *(pytest.param(each, marks=pytest.mark.slow) for each in ("abort", "exit", "fatal", "return"))],
    )
    def test_it_fails(self, cluster: Cluster, subject: Subject, kind: str) -> None:
        cluster.start_frontend()
        worker = cluster.start_worker(TLLM_STANDIN_FAULT=f"{kind}@step400").wait_ready(subject.start_seconds)
        spare = cluster.start_worker().wait_ready(subject.start_seconds)
        for each in (worker, spare):
            cluster.wait_routed(each)
        load = cluster.load(8, subject.stream_tokens)
        assert worker.wait_gone(20) == 1
        assert "Fatal error kind=EngineDeadError" in worker.log
        assert all(result.ok for result in load.wait()), load.summary()
        spare.stop()

    def test_a_failure_of_another_rank_ends_all(self, cluster: Cluster, subject: Subject) -> None:
        """It is silent until TensorRT-LLM itself ends the ranks, here after a second."""
        cluster.start_frontend()
        two = ("--tensor-parallel-size", "2")
        variables = {"TLLM_STANDIN_FAULT": "raise@step400:1", "TLLM_RANK_CRASH_HARD_KILL_GRACE": "1"}
        worker = cluster.start_worker(*two, **variables).wait_ready(subject.start_seconds)
        spare = cluster.start_worker(*two).wait_ready(subject.start_seconds)
        for each in (worker, spare):
            cluster.wait_routed(each)
        load = cluster.load(8, 800)
        assert worker.wait_gone(20) == 1
        assert all(result.ok for result in load.wait()), load.summary()
        spare.stop()

    def test_it_hangs_while_its_health_is_good(self, cluster: Cluster, subject: Subject) -> None:
        cluster.start_frontend()
        bound = ("--stall-timeout", str(subject.stall_timeout))
        worker = cluster.start_worker(*bound, TLLM_STANDIN_FAULT="hang@step400").wait_ready(subject.start_seconds)
        spare = cluster.start_worker(*bound).wait_ready(subject.start_seconds)
        for each in (worker, spare):
            cluster.wait_routed(each)
        load = cluster.load(8, subject.stream_tokens)
        assert worker.wait_gone(10 + 3 * subject.stall_timeout) == 1
        assert "Fatal error kind=EngineStalledError" in worker.log
        assert all(result.ok for result in load.wait()), load.summary()
        spare.stop()

    @pytest.mark.parametrize("kind", ["kill@start", pytest.param("kill@load", marks=pytest.mark.slow), "raise@load"])
    def test_it_dies_while_it_starts(self, cluster: Cluster, kind: str) -> None:
        worker = cluster.start_worker(TLLM_STANDIN_FAULT=kind, TLLM_STANDIN_LOAD_SECONDS="3")
        assert worker.wait_gone(40) == 3
        assert "TensorRT-LLM failed to start" in worker.log

    def test_a_model_that_loads_for_long(self, cluster: Cluster) -> None:
        worker = cluster.start_worker(TLLM_STANDIN_LOAD_SECONDS="60")
        worker.wait_log("Starting TensorRT-LLM", 40)
        eventually(lambda: [one for one in worker.children().values() if "mpi4py.futures" in one], 30, "the rank")
        time.sleep(1)
        assert worker.status("/live")[0] == 200
        since = worker.signal(signal.SIGTERM)
        assert worker.wait_gone(6) == 0
        print(f"gone after {time.monotonic() - since:.3f} s")


@needs_switches
class TestEngine:
    """What the engine does with requests, statistics and its own end."""

    def ask(self, cluster: Cluster, kind: str) -> int:
        """Send a prompt that makes the engine misbehave; return the status of the answer."""
        from tensorrt_llm.faults import trigger

        return cluster.complete(prompt=list(trigger(kind)))[0]

    def test_an_error_of_one_request_ends_no_other(self, cluster: Cluster) -> None:
        (worker,) = cluster.serve(1, *QUICK)
        load = cluster.load(4, 800)
        assert self.ask(cluster, "request_error") >= 400
        assert all(result.ok for result in load.wait()), load.summary()
        worker.stop()

    def test_an_error_that_says_the_device_is_lost_ends_the_worker(self, cluster: Cluster) -> None:
        (worker,) = cluster.serve(1)
        assert self.ask(cluster, "cuda_error") >= 400
        assert worker.wait_gone(5) == 1
        assert "illegal memory access" in worker.log

    def test_aborts_that_nobody_acknowledges(self, cluster: Cluster, subject: Subject) -> None:
        cluster.start_frontend()
        worker = cluster.start_worker(*QUICK, TLLM_STANDIN_IGNORE_ABORT="1").wait_ready(subject.start_seconds)
        cluster.wait_model()
        load = Load(cluster.url, [chat(subject.model, "The quick brown fox", 3500)] * 4, timeout=1.0)
        eventually(load.started, 10, "the streams")
        load.wait()
        worker.wait_log("has not acknowledged an abort", 10)
        eventually(lambda: worker.metric("dynamo_worker_in_flight") == 0, 10, "the requests to leave the worker")
        assert cluster.complete()[0] == 200
        worker.stop()

    def test_statistics_that_never_come(self, cluster: Cluster, subject: Subject) -> None:
        """They say nothing about the engine's health."""
        cluster.start_frontend()
        quiet = {"TLLM_STANDIN_SILENT_STATS": "1"}
        worker = cluster.start_worker("--stall-timeout", "3", *QUICK, **quiet).wait_ready(subject.start_seconds)
        cluster.wait_model()
        time.sleep(7)
        assert cluster.complete()[0] == 200
        worker.stop()

    def test_a_shutdown_that_never_returns(self, cluster: Cluster, subject: Subject) -> None:
        cluster.start_frontend()
        worker = cluster.start_worker(*QUICK, TLLM_STANDIN_IGNORE_STOP="1").wait_ready(subject.start_seconds)
        since = worker.signal(signal.SIGTERM)
        assert worker.wait_gone(9) == 0
        print(f"gone after {time.monotonic() - since:.3f} s")
        assert "own shutdown takes too long" in worker.log

    @pytest.mark.parametrize("whom", ["worker", pytest.param("supervisor", marks=pytest.mark.slow)])
    def test_a_helper_that_keeps_the_daemon_alive(self, cluster: Cluster, subject: Subject, whom: str) -> None:
        """It has inherited the pipe by which `orted` learns of the worker's death, so `orted` and the ranks stay."""
        cluster.start_frontend()
        worker: Worker = cluster.start_worker(TLLM_STANDIN_FORK_HOLDER_SECONDS="300")
        worker.wait_ready(subject.start_seconds)
        pids = [pid for pid, command in worker.children().items() if "orted" in command or "mpi4py" in command]
        assert len(pids) >= 2
        worker.signal(signal.SIGKILL, worker.worker_pid if whom == "worker" else worker.pid)
        assert worker.wait_gone(5) == 128 + signal.SIGKILL
        eventually(lambda: not set(pids) & set(worker.children()), 5, "the ranks to be gone")
