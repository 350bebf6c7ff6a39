"""Kubernetes discovery: the real runtime and our withdrawals against a server that stands in for the Kubernetes API."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from dynamo_worker.testing import Cluster, Worker, eventually
from dynamo_worker.testing.cluster import free_port

#: Where a pod finds its credentials; the workers of these tests see their own there.
_CREDENTIALS = "/var/run/secrets/kubernetes.io/serviceaccount"
_UNSHARE = ["unshare", "-m"]
_ACCESS = Path(__file__).parents[2] / "deploy" / "kubernetes-discovery" / "access.yaml"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or bool(subprocess.run([*_UNSHARE, "true"]).returncode),
    reason="a pod's credentials need a mount namespace",
)


class Api:
    """The API server, and pods that use it."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.port = free_port()
        self._directory = directory
        self._certificate = directory / "server.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(self._certificate))
        self._context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
        self.credentials = directory / "credentials"
        self.credentials.mkdir()
        authority.cert_pem.write_to_path(str(self.credentials / "ca.crt"))
        (self.credentials / "token").write_text("right")
        (self.credentials / "namespace").write_text("ours")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *actions: str) -> None:
        """Start the server; given ``RESOURCE:VERB``, an account may do nothing else."""
        command = [sys.executable, str(Path(__file__).parent / "kubernetes_server.py"), str(self.port)]
        self.process = subprocess.Popen([*command, str(self._certificate), *actions], stderr=subprocess.DEVNULL)
        eventually(lambda: self.resources() is not None, 20, "the API server")

    def resources(self) -> dict[str, Any] | None:
        """Return the data of each custom resource by name; None if the server does not answer."""
        url = f"https://127.0.0.1:{self.port}/apis/nvidia.com/v1alpha1/namespaces/ours/dynamoworkermetadatas"
        request = urllib.request.Request(url, headers={"Authorization": "Bearer right"})
        try:
            with urllib.request.urlopen(request, timeout=5, context=self._context) as response:
                items = json.load(response)["items"]
        except OSError:
            return None
        return {item["metadata"]["name"]: item["spec"]["data"] for item in items}

    def call(self, method: str, path: str, body: bytes = b"") -> Any:
        """Call the API as an administrator."""
        headers = {"Authorization": "Bearer right", "Content-Type": "application/json-patch+json"}
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", body, headers, method=method)
        with urllib.request.urlopen(request, timeout=5, context=self._context) as response:
            return json.load(response)

    def answer_all(self, status: int) -> int:
        """Have it answer everything with a status; return how many requests there were since the last such call."""
        return int(self.call("POST", "/trouble", str(status).encode())["asked"])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pod(self, **changes: str) -> dict[str, Any]:
        """Return how to start a worker as the only container of a pod."""
        mount = f"mount -t tmpfs none /var/run && mkdir -p {_CREDENTIALS} && cp {self.credentials}/* {_CREDENTIALS}"
        environment = {
            "DYN_DISCOVERY_BACKEND": "kubernetes",
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.port),
            "POD_NAME": "worker-0",
            "POD_UID": "1111",
            "POD_NAMESPACE": "ours",
        }
        return {"prefix": [*_UNSHARE, "sh", "-c", f'{mount} && exec "$@"', "sh"], **environment, **changes}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    server = Api(tmp_path)
    yield server
    server.kill()


def endpoints(api: Api, name: str) -> int:
    return len((api.resources() or {})[name]["endpoints"])


def serving(cluster: Cluster, *arguments: str, **pod: Any) -> Worker:
    return cluster.worker("--grace-period", "0", *arguments, **pod)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ({}, "worker-0"),
        ({"DYN_KUBE_DISCOVERY_MODE": "container", "CONTAINER_NAME": "main"}, "worker-0"),
        ({"DYN_KUBE_DISCOVERY_MODE": "container", "CONTAINER_NAME": "engine-1"}, "worker-0-engine-1"),
    ],
    ids=["pod", "main container", "container"],
)
def test_a_killed_worker_is_withdrawn(cluster: Cluster, api: Api, mode: dict[str, str], name: str) -> None:
    api.start()
    worker = serving(cluster, **api.pod(**mode))
    assert endpoints(api, name) == 1
    since = worker.signal(signal.SIGKILL, worker.worker_pid)
    eventually(lambda: endpoints(api, name) == 0, 3, "the entries to be removed")
    print(f"\nout of Kubernetes' discovery after {time.monotonic() - since:.3f} s")
    assert worker.wait_gone() == 137
    assert 'withdrawn="kubernetes: entries removed"' in worker.log
    assert (api.resources() or {})[name] == {
        "endpoints": {}, "model_cards": {}, "event_channels": {}, "event_sources": {}
    }  # fmt: skip
    # The next container of the pod takes the resource over.
    again = serving(cluster, **api.pod(**mode))
    assert endpoints(api, name) == 1
    again.stop()
    assert endpoints(api, name) == 0


_RESOURCE = "/apis/nvidia.com/v1alpha1/namespaces/ours/dynamoworkermetadatas/worker-0"


def test_a_resource_that_is_deleted_or_emptied_is_put_back(cluster: Cluster, api: Api) -> None:
    """``/health`` says no meanwhile; an API that does not answer or refuses is no reason for that, nor for an end."""
    api.start(*role("dynamo-discovery-read", "dynamo-discovery-write"), "dynamoworkermetadatas:delete")
    worker = serving(cluster, "--discovery-timeout", "3", "--discovery-outage", "3", **api.pod())
    before = api.resources()
    api.call("DELETE", _RESOURCE)
    eventually(lambda: worker.status("/health")[0] == 503, 10, "the loss to be noticed")
    assert "2 of its entries have vanished" in worker.status("/health")[1]
    assert worker.status("/live")[0] == 200
    eventually(lambda: worker.status("/health")[0] == 200, 10, "the worker to be in discovery again")
    assert api.resources() == before

    api.answer_all(403)
    eventually(lambda: "HTTP status 403: in trouble" in worker.log, 15, "the refusal to be said")
    assert worker.status("/health")[0] == 200
    time.sleep(4)
    assert worker.running, "neither --discovery-timeout nor --discovery-outage has anything to do with it"
    asked = api.answer_all(200)
    assert asked < 10
    eventually(lambda: "Discovery answers again" in worker.log, 15, "the worker to ask again")
    worker.stop()
    assert endpoints(api, "worker-0") == 0, "what the worker removes stays away"


def test_an_api_that_is_away_is_waited_for(cluster: Cluster, api: Api) -> None:
    worker = cluster.start_worker("--grace-period", "0", **api.pod())
    worker.wait_log('Waiting for a server server="the Kubernetes API" tried="127.0.0.1:.*: Connection refused"')
    api.start()
    worker.wait_ready()
    worker.stop()


def test_an_api_that_stays_away_is_said(cluster: Cluster, api: Api) -> None:
    worker = cluster.start_worker("--discovery-timeout", "1", **api.pod())
    assert worker.wait_gone() == 4
    assert f"the Kubernetes API cannot be reached (127.0.0.1:{api.port}: Connection refused); waited 1 s" in worker.log


def test_an_account_without_permission_is_said(cluster: Cluster, api: Api) -> None:
    api.start()
    (api.credentials / "token").write_text("wrong")
    worker = cluster.start_worker(**api.pod())
    assert worker.wait_gone() == 3
    assert "rejects this user: this account may not list" in worker.log
    assert "dynamoworkermetadatas" in worker.log


def role(*names: str) -> set[str]:
    """Return what roles of our manifest allow."""
    rules = [
        rule
        for each in yaml.safe_load_all(_ACCESS.read_text())
        if each["kind"] == "Role" and each["metadata"]["name"] in names
        for rule in each["rules"]
    ]
    return {f"{resource}:{verb}" for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


def test_the_roles_of_the_manifest_are_enough(cluster: Cluster, api: Api) -> None:
    """For the runtime, for `dynamo-worker top`, and for the guardian that withdraws a killed worker."""
    api.start(*role("dynamo-discovery-read", "dynamo-discovery-write"))
    pod = api.pod()
    worker = serving(cluster, **pod)
    command = [*pod.pop("prefix"), sys.executable, "-m", "dynamo_worker", "top", "--once", "--json"]
    top = subprocess.run(command, env=cluster.environment(**pod), capture_output=True, timeout=60, check=True)
    (seen,) = json.loads(top.stdout)["workers"]
    assert (seen["instance"], seen["state"], seen["models"]) == (worker.instance, "SERVING", ["echo"])
    worker.signal(signal.SIGKILL, worker.worker_pid)
    assert worker.wait_gone() == 137
    assert 'withdrawn="kubernetes: entries removed"' in worker.log
    assert endpoints(api, "worker-0") == 0


def test_a_worker_does_not_start_with_less(cluster: Cluster, api: Api) -> None:
    api.start(*role("dynamo-discovery-read", "dynamo-discovery-write") - {"dynamoworkermetadatas:create"})
    worker = cluster.start_worker("--discovery-timeout", "5", **api.pod())
    assert worker.wait_gone() not in (0, 137)
