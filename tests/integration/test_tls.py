"""Dynamo's TLS between a frontend and workers, with certificates on both sides, as docs/security.md has it."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import psutil
import pytest
import trustme

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing import Cluster


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, str]:
    """One authority, and one certificate that serves as both server's and client's."""
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    paths = {name: str(tmp_path / f"{name}.pem") for name in ("authority", "certificate", "key")}
    authority.cert_pem.write_to_path(paths["authority"])
    own.cert_chain_pems[0].write_to_path(paths["certificate"])
    own.private_key_pem.write_to_path(paths["key"])
    return paths


def variables(certificates: dict[str, str]) -> dict[str, str]:
    return {
        "DYN_TCP_TLS_CERT_PATH": certificates["certificate"],
        "DYN_TCP_TLS_KEY_PATH": certificates["key"],
        "DYN_TCP_TLS_CA_CERT_PATH": certificates["authority"],
        "DYN_TCP_TLS_CLIENT_CA_CERT_PATH": certificates["authority"],
        "DYN_TCP_TLS_CLIENT_CERT_PATH": certificates["certificate"],
        "DYN_TCP_TLS_CLIENT_KEY_PATH": certificates["key"],
    }


def answers_to(port: int, authority: str, own: tuple[str, str] | None) -> bool:
    """Whether what listens there goes on with a client of TLS after its handshake."""
    context = ssl.create_default_context(cafile=authority)
    if own is not None:
        context.load_cert_chain(*own)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 2) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            # With TLS 1.3 a certificate that is refused is an alert that comes after the handshake.
            try:
                return connection.recv(1) != b""
            except TimeoutError:
                return True  # it waits for our first message
    except OSError:
        return False


def test_requests_travel_encrypted_between_those_who_have_a_certificate(
    cluster: Cluster, certificates: dict[str, str]
) -> None:
    cluster.start_frontend(**variables(certificates))
    worker = cluster.worker("--grace-period", "0", **variables(certificates))
    cluster.wait_model()
    assert cluster.ask(50).ok
    ports = {
        connection.laddr.port
        for connection in psutil.Process(worker.worker_pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    own = (certificates["certificate"], certificates["key"])
    encrypted = [port for port in ports if answers_to(port, certificates["authority"], own)]
    assert len(encrypted) == 1, f"of {ports}: the request plane only"
    assert not answers_to(encrypted[0], certificates["authority"], None), "no certificate, no requests"
    worker.stop()


def test_a_frontend_without_a_certificate_gets_nothing(cluster: Cluster, certificates: dict[str, str]) -> None:
    cluster.start_frontend()
    worker = cluster.worker("--grace-period", "0", **variables(certificates))
    cluster.wait_model()
    assert not cluster.ask(5).ok
    assert worker.metric('dynamo_worker_requests_total{model="echo",outcome="completed"}') == 0
    worker.stop()
