"""Real discovery servers: lost while serving, and registrations that somebody else has to take back (etcd)."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_worker.testing import Cluster, Worker, eventually
from dynamo_worker.testing.cluster import free_port

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="no etcd server is installed (Debian: etcd-server)"
)


class Etcd:
    """One etcd server."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        peers = f"http://127.0.0.1:{free_port()}"
        command = ["etcd", "--data-dir", str(directory), "--listen-client-urls", self.url]
        command += ["--advertise-client-urls", self.url, "--listen-peer-urls", peers]
        command += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        eventually(self._answers, 15, "etcd")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))):
            return True
        return False

    def keys(self) -> str:
        """Return everything that stands below v1/ as etcd prints it: base64 keys, good enough to count."""
        body = b'{"key": "djEv", "range_end": "djEw", "keys_only": true}'
        with urllib.request.urlopen(f"{self.url}/v3/kv/range", body, timeout=5) as response:
            return response.read().decode()

    def empty(self) -> bool:
        return '"kvs"' not in self.keys()


@pytest.fixture
def etcd(cluster: Cluster, tmp_path: Path) -> Iterator[Etcd]:
    server = Etcd(tmp_path / "etcd", cluster.environment())
    yield server
    server.process.kill()
    server.process.wait()


def serving(cluster: Cluster, etcd: Etcd) -> Worker:
    return cluster.worker("--grace-period", "0", DYN_DISCOVERY_BACKEND="etcd", ETCD_ENDPOINTS=etcd.url)


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


def test_requests_through_etcd(cluster: Cluster, etcd: Etcd) -> None:
    cluster.start_frontend("--discovery-backend", "etcd", ETCD_ENDPOINTS=etcd.url)
    worker = serving(cluster, etcd)
    cluster.wait_model()
    assert cluster.ask().ok
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0


def test_a_worker_whose_keys_vanish_from_etcd_comes_back(cluster: Cluster, etcd: Etcd) -> None:
    cluster.start_frontend("--discovery-backend", "etcd", ETCD_ENDPOINTS=etcd.url)
    worker = serving(cluster, etcd)
    cluster.wait_model()
    before = etcd.keys()
    with urllib.request.urlopen(
        f"{etcd.url}/v3/kv/deleterange", b'{"key": "djEv", "range_end": "djEw"}', timeout=5
    ) as response:
        response.read()
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


@pytest.mark.slow
def test_discovery_lost(cluster: Cluster, etcd: Etcd) -> None:
    """The runtime gives up when its lease has expired, half a minute later; then the worker must not live on."""
    worker = serving(cluster, etcd)
    etcd.process.kill()
    assert worker.wait_gone(60) == 1
    assert "kind=DiscoveryLostError" in worker.log


def test_a_drain_on_request_while_etcd_is_stopped(cluster: Cluster, etcd: Etcd) -> None:
    """The worker refuses requests all the same, leaves once etcd answers, and a resume brings it back."""
    worker = serving(cluster, etcd)
    instance = base64.b64encode(b"v1/instances/").decode().rstrip("=")[:16]

    def listed() -> bool:
        keys = etcd.keys()
        return instance in keys

    assert listed()
    etcd.process.send_signal(signal.SIGSTOP)
    try:
        assert worker.operate("control/drain", {"grace_period": 0})["status"] == "success"
        eventually(lambda: worker.operate("control/drain_status")["phase"] == "drained", 5, "the drain")
        assert worker.operate("control/drain_status")["in_discovery"]
        assert worker.status("/health")[0] == 503
    finally:
        etcd.process.send_signal(signal.SIGCONT)
    eventually(lambda: not worker.operate("control/drain_status")["in_discovery"], 20, "the worker to leave")
    assert not listed()
    assert worker.operate("control/resume")["status"] == "success"
    assert listed()
    assert worker.status("/health")[0] == 200
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    assert etcd.empty()
