"""A worker in the environment that Dynamo's operator gives the pods of a graph, asked what the kubelet asks.

The environment is that of ai-dynamo/dynamo's ``deploy/operator`` (``component_common.go``, ``component_worker.go``),
read at 015d780 and later. Two values differ: discovery uses a directory, for there is no API server here, and the port
is one that is free.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_worker.testing import Cluster, Worker, eventually

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "graph.yaml"
#: What every component gets, and what workers get besides, without the discovery backend and the port.
POD = {
    "DYN_NAMESPACE": "default-example",
    "DYN_COMPONENT": "worker",
    "DYN_PARENT_DGD_K8S_NAME": "example",
    "DYN_PARENT_DGD_K8S_NAMESPACE": "default",
    "POD_NAME": "example-worker-4f1c9a2b-0",
    "POD_NAMESPACE": "default",
    "POD_UID": "3b7c0a52-9c2e-4a57-8f5e-0f3f1f6f5a10",
    "CONTAINER_NAME": "main",
    "DYN_KUBE_DISCOVERY_MODE": "container",
    "DYN_SYSTEM_ENABLED": "true",
    "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["generate"]',
    "NIXL_TELEMETRY_ENABLE": "n",
    "NIXL_TELEMETRY_EXPORTER": "prometheus",
    "NIXL_TELEMETRY_PROMETHEUS_PORT": "19090",
    "DYN_FORWARDPASS_METRIC_PORT": "20380",
    "DYN_NAMESPACE_WORKER_SUFFIX": "4f1c9a2b",
    "MODEL_EXPRESS_URL": "http://model-express:8001",
    "PROMETHEUS_ENDPOINT": "http://prometheus:9090",
}
#: Its own probes, which replace those of a manifest that has none: the path and the seconds for an answer.
OPERATOR_PROBES = {"startupProbe": ("/live", 5), "livenessProbe": ("/live", 4), "readinessProbe": ("/health", 4)}


def container() -> dict[str, Any]:
    """Return the container of the worker in our manifest."""
    graph = yaml.safe_load(MANIFEST.read_text())
    worker = next(component for component in graph["spec"]["components"] if component["type"] == "worker")
    return worker["podTemplate"]["spec"]["containers"][0]


def arguments() -> list[str]:
    """Return the container's arguments, with the engine that every machine has."""
    given = [word for word in container()["args"] if not word.startswith(("--engine=", "--model="))]
    return ["--engine", "echo", *given]


def start(cluster: Cluster, **environment: str) -> Worker:
    return cluster.start_worker(*arguments(), **{**POD, **environment})


# The operator enables the runtime's health checks if it knows that an image has runtime 1.4 or later.
@pytest.mark.parametrize("checks", ["false", "true"])
@pytest.mark.parametrize("kind", ["worker", "prefill", "decode"])
def test_the_probes_of_a_pod(cluster: Cluster, kind: str, checks: str) -> None:
    worker = start(cluster, DYN_COMPONENT=kind, DYN_HEALTH_CHECK_ENABLED=checks)
    # The startup probe waits for /live, for two hours at most. From then on the liveness probe asks.
    eventually(lambda: answers(worker, "/live", OPERATOR_PROBES["startupProbe"][1]), 30, "/live to answer")
    worker.wait_ready()
    for path, seconds in OPERATOR_PROBES.values():
        assert answers(worker, path, seconds), path
    worker.stop()


def test_a_pod_serves(cluster: Cluster) -> None:
    """Under the names that the operator's frontend, its planner and NVIDIA's workers expect."""
    cluster.start_frontend()
    worker = start(cluster, DYN_HEALTH_CHECK_ENABLED="true").wait_ready()
    worker.wait_log(r"Worker ready .*endpoint=default-example-4f1c9a2b\.backend\.generate ")
    cluster.wait_model()
    assert cluster.ask(8).ok
    worker.stop()


def test_the_probes_of_the_manifest_are_ours_to_answer(cluster: Cluster) -> None:
    worker = start(cluster, DYN_HEALTH_CHECK_ENABLED="false").wait_ready()
    for name in OPERATOR_PROBES:
        probe = container()[name]
        assert probe["httpGet"]["port"] == "system"
        assert answers(worker, probe["httpGet"]["path"], probe["timeoutSeconds"]), name
    worker.stop()


def test_the_pod_is_not_ready_while_it_is_drained_on_request(cluster: Cluster) -> None:
    """The kubelet restarts nothing then: /live stays as it was."""
    worker = start(cluster, DYN_HEALTH_CHECK_ENABLED="false").wait_ready()
    drained = cluster.run("drain", f"127.0.0.1:{worker.status_port}", "--wait", "--grace-period", "0")
    assert drained.returncode == 0, drained
    assert not answers(worker, "/health", 4)
    assert answers(worker, "/live", 4)
    resumed = cluster.run("resume", f"127.0.0.1:{worker.status_port}")
    assert resumed.returncode == 0, resumed
    assert answers(worker, "/health", 4)
    worker.stop()


def answers(worker: Worker, path: str, seconds: float) -> bool:
    """Return whether a probe succeeds."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{worker.status_port}{path}", timeout=seconds) as response:
            return response.status == 200
    except OSError:
        return False
