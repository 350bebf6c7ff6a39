"""Discovery servers with TLS and passwords: workers, withdrawals after a crash, and credentials that are wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from dynamo_worker.testing import Cluster, eventually
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.etcd_server import Etcd

needs_etcd = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="no etcd server is installed (Debian: etcd-server)"
)
needs_nats = pytest.mark.skipif(
    shutil.which("nats-server") is None, reason="no NATS server is installed (Debian: nats-server)"
)

_VARIABLES = {"ETCD_AUTH_CA": "authority", "ETCD_AUTH_CLIENT_CERT": "certificate", "ETCD_AUTH_CLIENT_KEY": "key"}
#: Seconds from a worker's death to the end of its entries.
_WITHDRAWN = 0.2


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """One authority, and one certificate that serves as both server's and client's."""
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1", "localhost")
    paths = {name: tmp_path / f"{name}.pem" for name in ("authority", "certificate", "key")}
    authority.cert_pem.write_to_path(str(paths["authority"]))
    own.cert_chain_pems[0].write_to_path(str(paths["certificate"]))
    own.private_key_pem.write_to_path(str(paths["key"]))
    return paths


@pytest.fixture
def secured(
    cluster: Cluster, tmp_path: Path, certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Etcd]:
    """An etcd that wants a certificate of its clients."""
    for variable, name in _VARIABLES.items():
        monkeypatch.setenv(variable, str(certificates[name]))
    arguments = ["--client-cert-auth", "--trusted-ca-file", str(certificates["authority"])]
    arguments += ["--cert-file", str(certificates["certificate"]), "--key-file", str(certificates["key"])]
    server = Etcd(tmp_path / "etcd", cluster.environment(), scheme="https", arguments=arguments)
    yield server
    server.kill()


def add_root(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an etcd ask for root's password, and this process know it."""
    etcd.call("/v3/auth/user/add", {"name": "root", "password": "secret"})
    etcd.call("/v3/auth/role/add", {"name": "root"})
    etcd.call("/v3/auth/user/grant", {"user": "root", "role": "root"})
    etcd.call("/v3/auth/enable", {})
    monkeypatch.setenv("ETCD_AUTH_USERNAME", "root")
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", "secret")


def check_a_killed_worker(cluster: Cluster, etcd: Etcd, **environment: str) -> None:
    environment |= {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd.url}
    cluster.start_frontend("--discovery-backend", "etcd", **environment)
    worker = cluster.worker("--grace-period", "0", **environment)
    cluster.wait_model()
    assert etcd.workers() == 1
    assert cluster.ask().ok
    etcd.delete_all()
    worker.wait_log("In discovery again", 20)
    since = worker.signal(signal.SIGKILL, worker.worker_pid)
    eventually(etcd.empty, 3, "the registration to be withdrawn")
    seconds = time.monotonic() - since
    print(f"\nout of {etcd.url.partition(':')[0]} etcd after {seconds:.3f} s")
    assert worker.wait_gone() == 137
    assert 'withdrawn="etcd: lease revoked"' in worker.log
    assert seconds < _WITHDRAWN or os.getloadavg()[0] > (os.cpu_count() or 1), f"{seconds:.3f} s on a quiet machine"


@needs_etcd
@pytest.mark.parametrize("form", ["path", "content"])
def test_mutual_tls(cluster: Cluster, secured: Etcd, certificates: dict[str, Path], form: str) -> None:
    """A user and a password besides are nothing that the runtime could do (1.6.1): it drops TLS then."""
    environment = {
        variable: str(certificates[name]) if form == "path" else certificates[name].read_text()
        for variable, name in _VARIABLES.items()
    }
    check_a_killed_worker(cluster, secured, **environment)


@needs_etcd
def test_a_password(cluster: Cluster, etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    add_root(etcd, monkeypatch)
    check_a_killed_worker(cluster, etcd, ETCD_AUTH_USERNAME="root", ETCD_AUTH_PASSWORD="secret")


def start(cluster: Cluster, *arguments: str, **environment: str) -> str:
    """Start a worker that cannot start; check that it says so at once, and return what it says."""
    started = time.monotonic()
    ended = cluster.run("--engine", "echo", *arguments, "--discovery-timeout", "60", timeout=100, **environment)
    assert time.monotonic() - started < 30, "it is not waited for"
    assert ended.returncode == 3, ended.stderr
    return ended.stderr


@needs_etcd
@pytest.mark.parametrize("credentials", [{}, {"ETCD_AUTH_USERNAME": "root", "ETCD_AUTH_PASSWORD": "wrong"}])
def test_a_wrong_password_of_etcd_is_said(
    cluster: Cluster, etcd: Etcd, monkeypatch: pytest.MonkeyPatch, credentials: dict[str, str]
) -> None:
    add_root(etcd, monkeypatch)
    said = start(cluster, DYN_DISCOVERY_BACKEND="etcd", ETCD_ENDPOINTS=etcd.url, **credentials)
    assert f"etcd at {etcd.url} rejects this user: " in said
    assert "check ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD" in said


@needs_etcd
def test_a_certificate_that_is_no_file_is_said(cluster: Cluster) -> None:
    ended = cluster.run("--engine", "echo", DYN_DISCOVERY_BACKEND="etcd", ETCD_AUTH_CA="/nowhere/ca.pem")
    assert ended.returncode == 2, ended.stderr
    assert "ETCD_AUTH_CA: expected the path of a PEM file, or its content: No such file or directory" in ended.stderr


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[str]:
    """A NATS server with a user; yields its host and port."""
    port = free_port()
    command = ["nats-server", "-a", "127.0.0.1", "-p", str(port), "--user", "me", "--pass", "secret", "-js"]
    process = subprocess.Popen(
        [*command, "-sd", str(tmp_path / "nats")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    eventually(listens, 15, "the NATS server")
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


@needs_nats
def test_nats_with_a_password(cluster: Cluster, nats: str) -> None:
    user = {"NATS_SERVER": f"nats://{nats}", "NATS_AUTH_USERNAME": "me"}
    cluster.worker("--request-plane", "nats", "--grace-period", "0", NATS_AUTH_PASSWORD="secret", **user).stop()
    said = start(cluster, "--request-plane", "nats", NATS_AUTH_PASSWORD="mistyped", **user)
    assert f"NATS at nats://{nats} rejects this user: -ERR 'Authorization Violation'" in said
    assert "check NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD" in said
    assert "mistyped" not in said
