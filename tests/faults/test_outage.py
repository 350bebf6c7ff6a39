"""An etcd that is away: requests go on, engines stay loaded, and everybody is back once it is.

``pytest tests/faults/test_outage.py -m slow -s`` shows the bars: outages of 45 s and 5 minutes under load.
"""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.supervisor.etcd import entries_lease
from dynamo_worker.testing import Cluster, Result, Worker, eventually
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.etcd_server import Etcd

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="no etcd server is installed (Debian: etcd-server)"
)

#: Seconds from the return of etcd to the last registration.
_BACK = 5.0


class Traffic:
    """One short request after the other, in the background.

    :ivar results: each request's start (monotonic) and result.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.results: list[tuple[float, Result]] = []
        self._cluster = cluster
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            started = time.monotonic()
            self.results.append((started, self._cluster.ask(16)))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)

    def lost(self) -> list[tuple[float, Result]]:
        return [(started, result) for started, result in self.results if not result.ok]


def environment(etcd: Etcd, **changes: str) -> dict[str, Any]:
    return {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd.url, **changes}


def fleet(cluster: Cluster, etcd: Etcd, **changes: str) -> list[Worker]:
    cluster.start_frontend("--discovery-backend", "etcd", **environment(etcd))
    workers = [cluster.start_worker("--grace-period", "0", **environment(etcd, **changes)) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    cluster.wait_model()
    return workers


def leave(etcd: Etcd, how: str, seconds: float, workers: list[Worker]) -> float:
    """Take etcd away for some seconds; return when it is back (monotonic)."""
    etcd.pause() if how == "stopped" else etcd.kill()
    time.sleep(seconds)
    assert all(worker.status("/health")[0] == 200 for worker in workers), "one server must not make a fleet unready"
    if how == "stopped":
        etcd.resume()
        return time.monotonic()
    if how == "emptied":
        etcd.forget()
    etcd.start()
    return time.monotonic()


def check_an_outage(cluster: Cluster, etcd: Etcd, how: str, seconds: float, **changes: str) -> None:
    workers = fleet(cluster, etcd, **changes)
    processes = [worker.worker_pid for worker in workers]
    longer = cluster.load(2, 4000)
    traffic = Traffic(cluster)
    time.sleep(1)
    back = leave(etcd, how, seconds, workers)
    if how == "stopped":
        time.sleep(0.6)  # what has expired is deleted within that time
    eventually(lambda: etcd.workers() == 2, _BACK, "both workers in etcd")
    registered = time.monotonic() - back
    time.sleep(2)
    traffic.stop()
    lost = traffic.lost()
    print(
        f"\netcd {how} for {seconds:g} s: {len(lost)} of {len(traffic.results)} requests lost, "
        f"both workers registered {registered:.2f} s after its return"
    )
    if how == "stopped":
        # Etcd has ended the leases by then. Until the workers are back, frontends have nobody to ask.
        assert all(back - 1 < started < back + _BACK and result.status in (404, 503) for started, result in lost), lost
    else:
        assert lost == []
    assert all(result.ok for result in longer.wait(seconds + 60))
    assert [worker.worker_pid for worker in workers] == processes
    assert all(worker.running for worker in workers)
    # The frontend sees what happens from now on.
    workers[0].stop()
    later = cluster.worker("--grace-period", "0", **environment(etcd, **changes))
    cluster.wait_routed(later)
    for worker in (workers[1], later):
        worker.stop()
    assert etcd.empty()


@pytest.mark.parametrize("how", ["killed", "stopped", "emptied"])
def test_an_etcd_that_is_away_for_longer_than_the_entries_lease(cluster: Cluster, etcd: Etcd, how: str) -> None:
    check_an_outage(cluster, etcd, how, 8, ETCD_LEASE_TTL="5")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [45, 300])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_long_outage(cluster: Cluster, etcd: Etcd, how: str, seconds: float) -> None:
    check_an_outage(cluster, etcd, how, seconds)


def test_leases_that_are_revoked_are_granted_again(cluster: Cluster, etcd: Etcd) -> None:
    """The runtime would shut down at its next renewal."""
    (worker, other) = fleet(cluster, etcd)
    instance = int(worker.instance, 16)
    for lease in (instance, entries_lease(instance)):
        etcd.call("/v3/lease/revoke", {"ID": str(lease)})
    assert etcd.workers() == 1
    eventually(lambda: etcd.workers() == 2, 15, "the worker to come back")
    eventually(lambda: "Lease granted again" in worker.log, 25, "the runtime's lease")
    assert int(etcd.call("/v3/lease/timetolive", {"ID": str(instance)})["TTL"]) > 600
    assert worker.status("/health")[0] == 200
    for each in (worker, other):
        each.stop()


def test_a_worker_that_is_killed_during_an_outage_and_its_requests(cluster: Cluster, etcd: Etcd) -> None:
    """Its requests migrate, and the next start withdraws what it has left in etcd."""
    workers = fleet(cluster, etcd)
    etcd.kill()
    load = cluster.load(8, 400)
    workers[0].signal(signal.SIGKILL, workers[0].worker_pid)
    assert workers[0].wait_gone() == 137
    assert all(result.ok for result in load.wait())
    etcd.start()
    assert etcd.workers() == 2
    later = cluster.worker("--grace-period", "0", **environment(etcd))
    later.wait_log("Cleaned up after an earlier worker")
    eventually(lambda: etcd.workers() == 2, 15, "the dead worker's entries to go")
    for worker in (workers[1], later):
        worker.stop()


def test_a_frontend_gives_up_as_well(cluster: Cluster, etcd: Etcd) -> None:
    """With an exit code on which it is restarted, after its streams."""
    (worker, other) = fleet(cluster, etcd)
    patient = environment(etcd, DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS="60")
    cluster.start_frontend("--discovery-backend", "etcd", "--discovery-outage", "3", **patient)
    cluster.wait_routed(worker)
    load = cluster.load(2, 3000)
    etcd.kill()
    frontend = cluster._processes[-1]
    assert frontend.wait(60) == 4
    assert all(result.ok for result in load.wait()), load.summary()
    etcd.start()
    for each in (worker, other):
        each.stop()


def test_a_server_that_accepts_and_never_answers(cluster: Cluster, etcd: Etcd) -> None:
    worker_log = ""
    etcd.pause()
    try:
        for command in (
            ["--engine", "echo"],
            ["frontend", "--discovery-backend", "etcd", "--http", f"127.0.0.1:{free_port()}"],
        ):
            ended = cluster.run(*command, "--discovery-timeout", "5", **environment(etcd))
            assert ended.returncode == 4, ended.stderr
            worker_log = worker_log or ended.stderr
            assert re.search(
                rf"etcd cannot be reached \({etcd.url}: .*it accepted, and did not answer within .* s\); waited 5 s",
                ended.stderr,
            )
        (start,), (end,) = (
            re.findall(rf"(\S+) \w+ dynamo_worker\S+: {message}", worker_log)
            for message in ("Starting worker", "Worker stopped")
        )
        seconds = (datetime.fromisoformat(end[:-1]) - datetime.fromisoformat(start[:-1])).total_seconds()
        print(f"\nexit {seconds:.1f} s after the start of the worker process")
        assert seconds < 7
    finally:
        etcd.resume()


def test_an_etcd_without_its_gateway(cluster: Cluster, tmp_path: Path) -> None:
    """Then the runtime's lease has to do, and everybody is as patient as that is long."""
    server = Etcd(tmp_path / "plain", cluster.environment(), arguments=["--enable-grpc-gateway=false"])
    try:
        cluster.start_frontend("--discovery-backend", "etcd", "--discovery-outage", "5", **environment(server))
        frontend = cluster._processes[-1]
        worker = cluster.worker("--grace-period", "0", **environment(server, ETCD_LEASE_TTL="5"))
        assert "Etcd has no HTTP gateway" in worker.log
        cluster.wait_model()
        assert cluster.ask().ok
        time.sleep(6)  # the runtime renews its lease
        assert cluster.ask().ok
    finally:
        server.kill()
    assert worker.wait_gone(30) == 1
    assert "kind=DiscoveryLostError" in worker.log
    assert frontend.wait(30) == 1, "it is restarted"
    shutil.rmtree(worker.run_dir)  # what could not be withdrawn is left for the next start
