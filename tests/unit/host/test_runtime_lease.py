"""The runtime's lease in etcd outlives an outage, and is granted again when etcd has lost it."""

from __future__ import annotations

import asyncio
import os

import pytest

from dynamo_worker.errors import ServerUnreachableError, UsageError
from dynamo_worker.host.discovery import runtime_lease
from dynamo_worker.host.discovery.runtime_lease import LeaseKeeper, RuntimeLease
from dynamo_worker.supervisor.etcd import EtcdError

pytestmark = pytest.mark.usefixtures("environment")

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


class FakeGateway:
    """An etcd with one lease at most."""

    def __init__(self):
        self.leases = {}
        self.away = False
        self.taken = False

    def call(self, path, body):
        if self.away:
            raise OSError("nobody listens")
        if path == "/v3/lease/timetolive":
            there = body["ID"] in self.leases
            return {"TTL": "9", "keys": self.leases[body["ID"]]} if there else {"TTL": "-1"}
        assert path == "/v3/lease/grant"
        if self.taken:
            raise EtcdError("etcdserver: lease already exists", 400)
        self.leases[body["ID"]] = []
        return {}


def test_half_of_its_life_is_enough_for_an_outage(monkeypatch):
    monkeypatch.setenv("ETCD_LEASE_TTL", "10")
    ttl = runtime_lease.prepare(100.0)
    assert ttl / 2 > 100
    assert os.environ["ETCD_LEASE_TTL"] == str(ttl)


def test_certificates_reach_the_runtime_as_text(monkeypatch, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text(PEM)
    monkeypatch.setenv("ETCD_AUTH_CA", str(path))
    monkeypatch.setenv("ETCD_AUTH_CLIENT_CERT", PEM)
    monkeypatch.setenv("ETCD_AUTH_CLIENT_KEY", "")
    runtime_lease.prepare(1.0)
    assert os.environ["ETCD_AUTH_CA"] == os.environ["ETCD_AUTH_CLIENT_CERT"] == PEM
    assert os.environ["ETCD_AUTH_CLIENT_KEY"] == ""


def test_a_certificate_that_cannot_be_read_is_a_mistake_of_the_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("ETCD_AUTH_CA", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"ETCD_AUTH_CA: expected the path of a PEM file, or its content: Is a directory"
    ):
        runtime_lease.prepare(1.0)


def test_a_lease_is_granted_again_only_if_it_is_gone(caplog):
    etcd = FakeGateway()
    lease = RuntimeLease(etcd, 77, 600)
    assert lease.ensure() == []
    assert etcd.leases == {"77": []}
    assert "Lease granted again" in caplog.text
    caplog.clear()
    etcd.leases["77"] = ["key"]
    assert lease.ensure() == ["key"]
    assert not caplog.records
    etcd.leases.clear()
    etcd.taken = True  # somebody was faster
    assert lease.ensure() == []


def test_a_keeper_reports_an_outage_once_its_end_and_one_that_is_too_long(monkeypatch, caplog):
    monkeypatch.setattr(runtime_lease, "_INTERVAL", 0.01)
    monkeypatch.setattr(runtime_lease, "_AWAY_INTERVAL", 0.01)
    etcd = FakeGateway()
    fatal = []

    async def main():
        keeping = asyncio.ensure_future(LeaseKeeper(RuntimeLease(etcd, 77, 600), fatal.append, outage=0.3).run())
        while "77" not in etcd.leases:
            await asyncio.sleep(0.005)
        etcd.away = True
        while "the frontend keeps serving" not in caplog.text:
            await asyncio.sleep(0.005)
        etcd.away = False
        while "Discovery answers again" not in caplog.text:
            await asyncio.sleep(0.005)
        assert not fatal
        etcd.away = True
        await asyncio.wait_for(keeping, 10)

    asyncio.run(main())
    (error,) = fatal
    assert isinstance(error, ServerUnreachableError)
    assert "discovery has not answered for 0.3 s: nobody listens" in str(error)
    assert caplog.text.count("the frontend keeps serving") == 2
