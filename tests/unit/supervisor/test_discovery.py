from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from dynamo_worker.supervisor import discovery

from .conftest import wait_until

INSTANCE = "4ec5c2a6e8130c29"
LEASE = int(INSTANCE, 16)
ENTRY = {"backend": "etcd", "instance": INSTANCE}


def soon() -> float:
    return time.monotonic() + 5.0


class TestFile:
    def test_all_files_of_the_instance_and_no_other(self, tmp_path):
        ours = [
            f"v1/instances/dynamo%2Fbackend%2Fgenerate%2F{INSTANCE}",
            f"v1/mdc/dynamo%2Fbackend%2Fgenerate%2F{INSTANCE}",
            f"v1/mdc/dynamo%2Fbackend%2Fgenerate%2F{INSTANCE}%2Flora",
            f"v1/event_channels/dynamo%2Fbackend%2F{INSTANCE}",
        ]
        other = "v1/instances/dynamo%2Fbackend%2Fgenerate%2F4ec5c2a6e8130c28"
        for name in (*ours, other):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        outcome = discovery.withdraw({"backend": "file", "root": str(tmp_path), "instance": INSTANCE}, soon())
        assert outcome == "file: 4 files removed"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / other]

    def test_its_publishers_as_well(self, tmp_path):
        """Their ids are not the worker's."""
        prefix = "namespace%2Fdynamo%2Ftopic%2Fkv%2Devents%2F"
        for name in ("159af42bd761b4", "8e7168f07fe58", "159af42bd761b5", "7"):
            (tmp_path / f"{prefix}{name}").touch()
        recorded = ["159af42bd761b4", "8e7168f07fe58", "7", ".*", None]
        entry = {"backend": "file", "root": str(tmp_path), "instance": INSTANCE}
        for wrong in ("159af42bd761b4", 5, None, {}):
            assert discovery.withdraw({**entry, "publishers": wrong}, soon()) == "file: 0 files removed"
        assert discovery.withdraw({**entry, "publishers": recorded}, soon()) == "file: 2 files removed"
        assert {path.name for path in tmp_path.iterdir()} == {f"{prefix}159af42bd761b5", f"{prefix}7"}

    def test_nothing_there(self, tmp_path):
        entry = {"backend": "file", "root": str(tmp_path / "missing"), "instance": INSTANCE}
        assert discovery.withdraw(entry, soon()) == "file: 0 files removed"

    @pytest.mark.parametrize("instance", ["a", "", "report-2026", ".*", "4EC5C2A6E8130C29", 7])
    def test_an_id_that_would_match_anything(self, tmp_path, instance):
        (tmp_path / "abc-report-2026-7").touch()
        outcome = discovery.withdraw({"backend": "file", "root": str(tmp_path), "instance": instance}, soon())
        assert "is not an instance id" in outcome
        assert (tmp_path / "abc-report-2026-7").exists()

    @pytest.mark.parametrize("name", [f"{INSTANCE}0", f"0{INSTANCE}", f"x%2FA{INSTANCE}", f"{INSTANCE}abcdef"])
    def test_a_longer_number_is_another_one(self, tmp_path, name):
        """Such as the name of an object in a store of contents."""
        (tmp_path / name).touch()
        discovery.withdraw({"backend": "file", "root": str(tmp_path), "instance": INSTANCE}, soon())
        assert (tmp_path / name).exists()

    def test_only_in_the_discovery_directory(self, tmp_path):
        """What a dead worker has recorded may be forged."""
        ours, elsewhere, link = tmp_path / "kv", tmp_path / "elsewhere", tmp_path / "link"
        for directory in (ours, elsewhere):
            directory.mkdir()
            (directory / INSTANCE).touch()
        (ours / "v1").symlink_to(elsewhere)
        link.symlink_to(ours)
        entry = {"backend": "file", "root": str(elsewhere), "instance": INSTANCE}
        assert discovery.withdraw(entry, soon(), str(ours)) == (
            f"file: left to expire: {elsewhere} is not the discovery directory of this worker"
        )
        assert discovery.withdraw({**entry, "root": str(link)}, soon(), str(ours)) == "file: 1 files removed"
        assert [path.parent for path in tmp_path.rglob(INSTANCE)] == [elsewhere]

    def test_incomplete_entry(self):
        assert discovery.withdraw({"backend": "file"}, soon()).startswith("file: failed: KeyError")


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({}, False),
        ({"ETCD_ENDPOINTS": "http://one:2379"}, False),
        ({"ETCD_ENDPOINTS": "http://one:2379,https://two:2379"}, True),
        ({"ETCD_ENDPOINTS": "two:2379", "ETCD_AUTH_CA": "/nowhere"}, True),
        ({"DYN_DISCOVERY_BACKEND": "kubernetes"}, True),
    ],
)
def test_tls_is_loaded_before_it_is_needed(variables, loaded):
    """Only where it is needed: guardians without it stay small."""
    names = ("ETCD_ENDPOINTS", "ETCD_AUTH_CA", "DYN_DISCOVERY_BACKEND")
    environment = {**{name: value for name, value in os.environ.items() if name not in names}, **variables}
    code = (
        "import sys; from dynamo_worker.supervisor import discovery; discovery.prepare(); print('ssl' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(loaded)


@pytest.mark.parametrize("backend", ["kubernetes", "mem"])
def test_backends_that_need_nothing(backend):
    """Kubernetes needs something in a pod only: tests/faults/test_kubernetes.py."""
    assert discovery.withdraw({"backend": backend, "instance": "1"}, soon()).startswith(
        f"{backend}: nothing to withdraw from outside"
    )


def test_a_later_start_leaves_the_resource_of_its_pod_alone():
    """It is its own by then."""
    entry = {"backend": "kubernetes", "instance": "1"}
    assert discovery.withdraw(entry, soon(), "/discovery") == "kubernetes: left to this pod's own worker"


def post(url: str, path: str, body: dict[str, object], token: str | None = None) -> dict[str, object]:
    request = urllib.request.Request(url + path, json.dumps(body).encode())
    if token:
        request.add_header("Authorization", token)
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)


def text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


@pytest.fixture
def etcd(tmp_path):
    """A real etcd; yields its URL."""
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("etcd is not installed")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        client, peer = one.getsockname()[1], two.getsockname()[1]
    url = f"http://127.0.0.1:{client}"
    process = subprocess.Popen(
        [
            program, "--data-dir", str(tmp_path / "etcd"), "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls",
            f"http://127.0.0.1:{peer}", "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def up() -> bool:
        try:
            post(url, "/v3/kv/range", {"key": text("x")})
        except OSError:
            return False
        return True

    try:
        wait_until(up, 20.0, "etcd up")
        yield url
    finally:
        process.kill()
        process.wait()


def lease_with_key(url: str, lease: int, token: str | None = None) -> None:
    post(url, "/v3/lease/grant", {"ID": str(lease), "TTL": "60"}, token)
    post(url, "/v3/kv/put", {"key": text("v1/instances/x"), "value": text("{}"), "lease": str(lease)}, token)
    assert int(keys(url, token)["count"]) == 1


def keys(url: str, token: str | None = None) -> dict[str, object]:
    return {"count": 0, **post(url, "/v3/kv/range", {"key": text("v1/instances/x")}, token)}


class TestEtcd:
    def test_the_lease_goes_with_all_its_keys(self, etcd, monkeypatch):
        lease_with_key(etcd, LEASE)
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:1, {etcd}")
        assert discovery.withdraw(ENTRY, soon()) == "etcd: lease revoked"
        assert int(keys(etcd)["count"]) == 0
        assert discovery.withdraw(ENTRY, soon()) == "etcd: lease already gone"

    def test_an_address_without_scheme(self, etcd, monkeypatch):
        lease_with_key(etcd, LEASE)
        monkeypatch.setenv("ETCD_ENDPOINTS", etcd.removeprefix("http://"))
        assert discovery.withdraw(ENTRY, soon()) == "etcd: lease revoked"

    def test_a_recorded_address_gets_no_password(self, monkeypatch):
        """Somebody may have forged the record: our own environment says where etcd is, and the id which lease."""
        monkeypatch.setenv("ETCD_AUTH_USERNAME", "root")
        monkeypatch.setenv("ETCD_AUTH_PASSWORD", "secret")
        monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
        with socket.create_server(("127.0.0.1", 0)) as trap:
            trap.settimeout(0.2)
            endpoint = f"http://127.0.0.1:{trap.getsockname()[1]}"
            outcome = discovery.withdraw({**ENTRY, "endpoints": [endpoint], "lease": 4711}, time.monotonic() + 1)
            assert outcome.startswith("etcd: failed")
            with pytest.raises(TimeoutError):
                trap.accept()

    def test_with_a_password(self, etcd, monkeypatch):
        post(etcd, "/v3/auth/user/add", {"name": "root", "password": "secret"})
        post(etcd, "/v3/auth/role/add", {"name": "root"})
        post(etcd, "/v3/auth/user/grant", {"user": "root", "role": "root"})
        post(etcd, "/v3/auth/enable", {})
        token = str(post(etcd, "/v3/auth/authenticate", {"name": "root", "password": "secret"})["token"])
        lease_with_key(etcd, LEASE, token)
        monkeypatch.setenv("ETCD_ENDPOINTS", etcd)
        monkeypatch.setenv("ETCD_AUTH_USERNAME", "root")
        monkeypatch.setenv("ETCD_AUTH_PASSWORD", "wrong")
        assert "authentication failed" in discovery.withdraw(ENTRY, soon())
        monkeypatch.setenv("ETCD_AUTH_PASSWORD", "secret")
        assert discovery.withdraw(ENTRY, soon()) == "etcd: lease revoked"
        assert int(keys(etcd, token)["count"]) == 0

    def test_nobody_there(self, monkeypatch):
        monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
        assert "Connection refused" in discovery.withdraw(ENTRY, soon())

    def test_a_server_that_does_not_answer(self, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            monkeypatch.setenv("ETCD_ENDPOINTS", f"{endpoint},{endpoint}")
            started = time.monotonic()
            outcome = discovery.withdraw(ENTRY, time.monotonic() + 0.3)
            assert "it accepted, and did not answer" in outcome
            assert time.monotonic() - started < 2.0

    def test_something_else_at_that_address(self, monkeypatch):
        """An answer that is not etcd's is a failure with what it said."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            pid = os.fork()
            if pid == 0:
                connection, _ = server.accept()
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n<html>nope</html>")
                os._exit(0)
            monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{server.getsockname()[1]}")
            outcome = discovery.withdraw(ENTRY, soon())
            os.waitpid(pid, 0)
        assert "failed" in outcome
        assert "nope" in outcome

    def test_end_to_end(self, etcd, supervised, measured):
        lease_with_key(etcd, LEASE)
        supervised.environment["ETCD_ENDPOINTS"] = etcd
        supervised.start(f"register-etcd={INSTANCE}", "state=SERVING", "arrived", "hang")
        started = time.monotonic()
        os.kill(supervised.worker, 9)
        measured("kill -9 of the worker: lease revoked", wait_until(lambda: not int(keys(etcd)["count"])), 0.5)
        assert supervised.wait() == 137
        measured("kill -9 of the worker with etcd: exit", time.monotonic() - started, 0.5)
        assert 'withdrawn="etcd: lease revoked"' in supervised.text
