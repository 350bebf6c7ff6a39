"""Flight records of real workers: several in one directory, and what the next worker and the command tell of an end."""

from __future__ import annotations

import json
import os
import signal

import pytest

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.waiting import eventually


def test_the_next_worker_shows_the_last_exit(cluster: Cluster) -> None:
    first, other = (cluster.start_worker("--process-tree", "--grace-period", "0") for _ in range(2))
    for worker in (first, other):
        worker.wait_ready()
    assert other.metric("dynamo_worker_last_exit_timestamp_seconds") == 0
    first.signal(signal.SIGKILL, first.engine_process("echo_process:Core"))
    assert first.wait_gone() == 1
    first.check_explained()
    told = first.explain()
    assert told.exit is not None
    assert (told.exit.kind, told.exit.stage) == ("engine-dead", "SERVING")
    (death,) = [entry for entry in told.deaths if "engine" in entry["what"]]
    assert death["signal"] == "SIGKILL"
    after = cluster.worker()
    text = after.status("/metrics")[1]
    assert 'dynamo_worker_last_exit_reason{reason="engine-dead"} 1.0' in text
    assert after.metric("dynamo_worker_last_exit_code") == 1
    assert abs(after.metric("dynamo_worker_last_exit_timestamp_seconds") - told.started - told.ran) < 10
    shown = cluster.run("explain", "--json")
    assert json.loads(shown.stdout)["file"] == told.file, "that of a living worker is not the last"
    other.stop()
    after.stop()
    assert len(list(cluster.records.glob("dw-*.jsonl"))) == 3


def test_a_drain_is_told_with_its_stages_and_requests(cluster: Cluster) -> None:
    (worker,) = cluster.serve(1, "--grace-period", "0.5", "--tokens-per-second", "40")
    cluster.wait_routed(worker)
    load = cluster.load(3, 60)
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    assert all(result.ok for result in load.wait())
    told = worker.explain()
    assert told.requests.finished == 3
    assert told.requests.cut == {}
    planned = {stage.name: stage.planned for stage in told.stages}
    assert (planned["unregister"], planned["grace"], planned["kill"]) == (1.0, 0.5, 2.0)
    assert {"runtime", "engine", "warm-up", "registration"} <= {entry["name"] for entry in told.steps}
    assert {"on_ready", "drain", "cleanup"} <= {entry["hook"] for entry in told.hooks}
    assert [entry["signal"] for entry in told.signals] == ["SIGTERM"]


def test_a_wrong_flag_is_told(cluster: Cluster) -> None:
    worker = cluster.start_worker("--drain", "nonsense")
    assert worker.wait_gone() == 2
    worker.check_explained()
    told = worker.explain()
    assert told.exit is not None
    assert told.exit.kind == "usage"
    assert "--drain" in told.exit.reason


@pytest.mark.parametrize("place", ["link", "file", "read-only"])
def test_a_place_that_cannot_be_used_harms_nothing(cluster: Cluster, place: str) -> None:
    if place == "link":
        cluster.records.symlink_to(cluster.tmp)
    elif place == "file":
        cluster.records.touch()
    else:
        cluster.records = type(cluster.records)("/proc/records")  # nobody can write there, not even root
    worker = cluster.worker()
    assert worker.status("/health")[0] == 200
    worker.stop()
    assert worker.log.count("No flight record") == 1
    assert [name for name in os.listdir(cluster.tmp) if name.endswith(".jsonl")] == []


def test_supervisor_and_guardian_killed_at_once(cluster: Cluster) -> None:
    worker = cluster.worker()
    run_dir = worker.run_dir
    for number in (signal.SIGSTOP, signal.SIGKILL):
        worker.signal(number, worker.guardian_pid)
        worker.signal(number)
    worker.wait_gone()
    shown = cluster.run("explain")
    assert "137 (all-killed)" in shown.stdout
    after = cluster.worker()
    eventually(lambda: not run_dir.exists(), 30.0, "the run directory to go")
    worker.check_explained()
    after.stop()
