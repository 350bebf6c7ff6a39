"""What tests see of a worker is what the worker did."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from dynamo_worker.testing.cluster import Cluster, Worker, free_port
from dynamo_worker.testing.leftovers import MARKER
from dynamo_worker.testing.waiting import eventually


@pytest.fixture
def cluster(tmp_path, no_leftovers, marker):
    cluster = Cluster(tmp_path, no_leftovers.tmp, marker)
    yield cluster
    cluster.close()


@pytest.fixture
def program(cluster, tmp_path):
    """Run a Python program in the place of a worker."""

    def start(source):
        log = tmp_path / "log"
        return Worker(cluster._start([sys.executable, "-c", source], log, {}), log, cluster, free_port())

    return start


#: A supervisor, a guardian, a worker and an engine: each starts the next, and all have the engine's name in their
#: command lines. The worker writes what the log of a real one has.
CHAIN = """
import os, subprocess, sys, time
left = int(sys.argv[1])
child = subprocess.Popen([sys.executable, __file__, str(left - 1), "my-engine"]) if left else None
if left == 1:
    print(f"Starting worker engine=x pid={os.getpid()}", flush=True)
time.sleep(60)
"""


def test_processes_of_the_engine_are_below_the_worker(cluster, tmp_path):
    script, log = tmp_path / "chain.py", tmp_path / "log"
    script.write_text(CHAIN)
    worker = Worker(cluster._start([sys.executable, str(script), "3", "my-engine"], log, {}), log, cluster, free_port())
    eventually(lambda: len(worker.children()) == 3)
    worker.wait_log("Starting worker")
    engine = worker.engine_process("my-engine")
    assert worker.children(worker.worker_pid).keys() == {engine}
    with pytest.raises(AssertionError, match="exactly one process"):
        worker.child("my-engine")
    with pytest.raises(AssertionError, match=r"matches \[\]"):
        worker.engine_process("another")
    for pid in worker.children():
        worker.signal(signal.SIGKILL, pid)


def test_the_environment_leads_nowhere_else(cluster, marker, monkeypatch):
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://production:2379")
    monkeypatch.setenv("DYN_NAMESPACE", "production")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("DYNAMO_WORKER_CONTROL_FD", "3")
    environment = cluster.environment(DYN_LOG="debug", DYN_SYSTEM_HOST=None)
    assert not {"ETCD_ENDPOINTS", "DYN_NAMESPACE", "NOTIFY_SOCKET", "DYNAMO_WORKER_CONTROL_FD"} & set(environment)
    assert environment["DYN_FILE_KV"] == str(cluster.discovery)
    assert environment[MARKER] == marker
    assert environment["DYN_LOG"] == "debug"
    assert "DYN_SYSTEM_HOST" not in environment
    assert "PATH" in environment


def test_free_ports_are_free_and_not_those_of_outgoing_connections():
    for _ in range(20):
        port = free_port()
        assert 10_000 <= port < 30_000
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_worker_is_waited_for_by_what_it_logs(program):
    worker = program("import time; print('Worker ready model=m instance=4ec5 x=1', flush=True); time.sleep(60)")
    assert worker.wait_ready().instance == "4ec5"
    assert worker.running
    worker.signal(signal.SIGKILL)
    assert worker.wait_gone() == 137
    assert not worker.running


def test_the_last_line_of_a_worker_that_has_ended_counts(program):
    worker = program("print('almost\\nWorker ready instance=ab')")
    worker.wait_gone()
    assert worker.wait_ready().instance == "ab"


def test_a_worker_that_ends_first_is_told_with_its_log(program):
    worker = program("print('no GPU'); raise SystemExit(3)")
    with pytest.raises(AssertionError, match=r"exited with 3 before logging[\s\S]*no GPU"):
        worker.wait_ready(30)
    assert worker.wait_gone() == 3


def test_a_worker_that_does_not_end_is_told_with_its_log(program):
    worker = program("import time; print('busy', flush=True); time.sleep(60)")
    worker.wait_log("busy")
    with pytest.raises(AssertionError, match=r"still running after 0\.05 s; end of its log:\nbusy"):
        worker.wait_gone(0.05)


def test_processes_below_a_worker_are_found_by_their_command(program):
    rank = "import time; time.sleep(60) #rank"
    core = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}]) #core"
    worker = program(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {core!r}])\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    worker.wait_log("up")
    # A child that has not reached its own program yet still bears its parent's command line.
    eventually(lambda: sorted("subprocess" in line for line in worker.children().values()) == [False, True], 10)
    core, rank = worker.child("#core$"), worker.child("sleep.60. #rank$")
    assert core != rank
    with pytest.raises(AssertionError, match="exactly one process"):
        worker.child("python")
    with pytest.raises(AssertionError, match=r"exactly one process, matches \[\]"):
        worker.child("nobody")
    for pid in (rank, core):
        worker.signal(signal.SIGKILL, pid)


def test_a_status_server_that_is_not_there_has_status_0(program):
    assert program("").status("/live") == (0, "")


def test_a_metric_is_the_sum_of_its_samples(program, monkeypatch):
    worker = program("")
    text = 'up 1\nrequests{model="a b"} 2\nrequests{model="c"} 3.5\nrequests_total 100\n# TYPE requests counter\n'
    monkeypatch.setattr(worker, "status", lambda path: (200, text))
    assert worker.metric("requests") == 5.5
    assert worker.metric('requests{model="c"}') == 3.5
    assert worker.metric("absent") == 0


def test_a_stop_that_fails_is_told_with_the_log(program):
    worker = program(
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(7))\n"
        "print('meant', flush=True); time.sleep(60)"
    )
    worker.wait_log("meant")
    with pytest.raises(AssertionError, match=r"expected exit code 0, got 7; end of the log:\nmeant"):
        worker.stop()


def test_registered_is_what_discovery_says(program, cluster):
    worker = program("print('Worker ready instance=4ec5c2a6e8130c29')").wait_ready()
    assert not worker.registered
    path = cluster.discovery / "v1" / "instances" / "dynamo%2Fbackend%2Fgenerate%2F4ec5c2a6e8130c29"
    path.parent.mkdir(parents=True)
    path.touch()
    assert worker.registered
    path.unlink()
    assert not worker.registered


def test_closing_ends_what_still_runs(program, cluster):
    worker = program("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)")
    worker.wait_log("up")
    cluster.close()
    assert not worker.running


def test_commands_run_to_their_end(cluster):
    result = cluster.run("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("dynamo-worker ")
    assert isinstance(result, subprocess.CompletedProcess)
