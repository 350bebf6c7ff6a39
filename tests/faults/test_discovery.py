"""Real discovery servers: lost while serving, and registrations that somebody else has to take back (etcd)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import time

import pytest

from dynamo_worker.testing import Cluster, Worker, eventually
from dynamo_worker.testing.etcd_server import Etcd

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="no etcd server is installed (Debian: etcd-server)"
)


def serving(cluster: Cluster, etcd: Etcd, *arguments: str) -> Worker:
    return cluster.worker("--grace-period", "0", *arguments, DYN_DISCOVERY_BACKEND="etcd", ETCD_ENDPOINTS=etcd.url)


def test_a_clean_stop_leaves_nothing_in_etcd(cluster: Cluster, etcd: Etcd) -> None:
    worker = serving(cluster, etcd)
    assert not etcd.empty()
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    assert etcd.empty()


def test_the_registration_of_a_killed_worker_is_withdrawn(cluster: Cluster, etcd: Etcd) -> None:
    worker = serving(cluster, etcd)
    since = worker.signal(signal.SIGKILL, worker.worker_pid)
    eventually(etcd.empty, 3, "the registration to be withdrawn")
    print(f"out of etcd after {time.monotonic() - since:.3f} s")
    assert worker.wait_gone() == 137


def test_the_registration_of_a_killed_supervisor_is_withdrawn(cluster: Cluster, etcd: Etcd) -> None:
    worker = serving(cluster, etcd)
    worker.signal(signal.SIGKILL)
    eventually(etcd.empty, 3, "the registration to be withdrawn")
    eventually(lambda: not os.path.exists(worker.run_dir), 3, "the guardian to be done, before etcd goes away")


def test_requests_through_etcd(cluster: Cluster, etcd: Etcd) -> None:
    cluster.start_frontend("--discovery-backend", "etcd", ETCD_ENDPOINTS=etcd.url)
    worker = serving(cluster, etcd)
    cluster.wait_model()
    assert cluster.ask().ok
    top = cluster.run("top", "--once", "--json", DYN_DISCOVERY_BACKEND="etcd", ETCD_ENDPOINTS=etcd.url)
    (seen,) = json.loads(top.stdout)["workers"]
    assert (seen["instance"], seen["state"], seen["models"]) == (worker.instance, "SERVING", ["echo"])
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_a_worker_whose_keys_vanish_from_etcd_comes_back(cluster: Cluster, etcd: Etcd) -> None:
    cluster.start_frontend("--discovery-backend", "etcd", ETCD_ENDPOINTS=etcd.url)
    worker = serving(cluster, etcd)
    cluster.wait_model()
    before = etcd.keys()
    etcd.delete_all()
    assert etcd.empty()
    eventually(lambda: worker.status("/health")[0] == 503, 20, "/health to answer 503")
    worker.wait_log("In discovery again", 20)
    assert worker.status("/health")[0] == 200
    assert re.findall('"key":"[^"]*"|"lease":"[^"]*"', etcd.keys()) == re.findall(
        '"key":"[^"]*"|"lease":"[^"]*"', before
    )
    eventually(lambda: cluster.ask(1).ok, 10, "an answer")
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    assert etcd.empty()


def test_discovery_lost(cluster: Cluster, etcd: Etcd) -> None:
    """A worker that no frontend can find for long must not live on; a restart finds another server, perhaps."""
    worker = serving(cluster, etcd, "--discovery-outage", "3")
    etcd.kill()
    assert worker.wait_gone(30) == 4
    assert "kind=ServerUnreachableError" in worker.log
    assert f"discovery has not answered for 3 s: etcd: {etcd.url}: " in worker.log
    assert "Registration not withdrawn" in worker.log
    assert sorted(path.name for path in worker.run_dir.iterdir()) == ["ledger.jsonl", "owner"]
    etcd.start()
    later = serving(cluster, etcd)
    later.wait_log("Cleaned up after an earlier worker .*etcd: lease revoked")
    eventually(lambda: etcd.workers() == 1, 5, "only the later worker to be registered")
    later.stop()


def test_a_drain_on_request_while_etcd_is_stopped(cluster: Cluster, etcd: Etcd) -> None:
    """The worker refuses requests all the same, leaves once etcd answers, and a resume brings it back."""
    worker = serving(cluster, etcd)
    instance = base64.b64encode(b"v1/instances/").decode().rstrip("=")[:16]

    def listed() -> bool:
        keys = etcd.keys()
        return instance in keys

    assert listed()
    etcd.pause()
    try:
        assert worker.operate("control/drain", {"grace_period": 0})["status"] == "success"
        eventually(lambda: worker.operate("control/drain_status")["phase"] == "drained", 5, "the drain")
        assert worker.operate("control/drain_status")["in_discovery"]
        assert worker.status("/health")[0] == 503
    finally:
        etcd.resume()
    eventually(lambda: not worker.operate("control/drain_status")["in_discovery"], 20, "the worker to leave")
    assert not listed()
    assert worker.operate("control/resume")["status"] == "success"
    assert listed()
    assert worker.status("/health")[0] == 200
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    assert etcd.empty()
