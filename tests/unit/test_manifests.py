"""The pods in deploy/kubernetes pass a review, and each rule of it can fail."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pod_policy as policy
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = [DEPLOY / "kubernetes" / f"{name}.yaml" for name in ("worker", "frontend", "network")]
#: What the runtime and the guardian do with the Kubernetes API (tests/faults/test_kubernetes.py).
READ = {("dynamoworkermetadatas", verb) for verb in ("get", "list", "watch")}
READ |= {("endpointslices", verb) for verb in ("list", "watch")}
WRITE = {("dynamoworkermetadatas", verb) for verb in ("create", "patch")}


def load(*paths: Path) -> list[dict[str, Any]]:
    return [each for path in paths for each in yaml.safe_load_all(path.read_text())]


DOCUMENTS = load(*FILES)
ACCESS = load(DEPLOY / "kubernetes-discovery" / "access.yaml")


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in policy.kind(documents, "Deployment")]


def graph_pod() -> dict[str, Any]:
    (graph,) = load(DEPLOY / "kubernetes" / "graph.yaml")
    return next(each for each in graph["spec"]["components"] if each["type"] == "worker")["podTemplate"]["spec"]


def review(documents: list[dict[str, Any]]) -> list[str]:
    """Return all that a review objects to."""
    found = [
        text
        for pod in pods(documents)
        for rule in (policy.restricted, policy.writable, policy.memory)
        for text in rule(pod)
    ]
    found += [text for each in policy.kind(documents, "Deployment") for text in policy.times(each)]
    return found + policy.fleet(documents) + policy.network(documents) + policy.ports(documents)


def test_the_manifests_pass() -> None:
    assert review(DOCUMENTS) == []


def test_the_graph_passes() -> None:
    pod = graph_pod()
    assert [
        text for rule in (policy.restricted, policy.writable, policy.memory, policy.stopping) for text in rule(pod)
    ] == []


def change(*path: Any, to: Any = None) -> Callable[[list[dict[str, Any]]], None]:
    """Return a function that changes, or without ``to`` removes, one value of the documents.

    :param path: kind and name of a document, and then the way to the value.
    """

    def apply(documents: list[dict[str, Any]]) -> None:
        target: Any = next(each for each in documents if (each["kind"], each["metadata"]["name"]) == path[:2])
        for key in path[2:-1]:
            target = target[key]
        if to is None:
            del target[path[-1]]
        else:
            target[path[-1]] = to

    return apply


WORKER = ("Deployment", "dynamo-worker", "spec")
POD = (*WORKER, "template", "spec")
MAIN = (*POD, "containers", 0)
FRONTEND = ("Deployment", "dynamo-frontend", "spec", "template", "spec", "containers", 0)
NETWORK = ("NetworkPolicy", "dynamo-worker", "spec")


@pytest.mark.parametrize(
    ("seed", "objection"),
    [
        (change(*POD, "hostNetwork", to=True), "hostNetwork"),
        (change(*POD, "volumes", 1, to={"name": "scratch", "hostPath": {"path": "/"}}), "volume hostPath"),
        (change(*POD, "securityContext", "runAsNonRoot"), "worker: runAsNonRoot"),
        (change(*POD, "securityContext", "runAsUser", to="worker"), "worker: runAsUser"),
        (change(*POD, "initContainers", 0, "securityContext", "runAsUser", to=0), "directories: runAsUser"),
        (change(*POD, "securityContext", "seccompProfile"), "worker: seccompProfile"),
        (change(*MAIN, "securityContext", "allowPrivilegeEscalation"), "worker: allowPrivilegeEscalation"),
        (change(*MAIN, "securityContext", "capabilities", "add", to=["SYS_PTRACE"]), "worker: capabilities"),
        (change(*MAIN, "securityContext", "capabilities"), "worker: capabilities"),
        (change(*MAIN, "securityContext", "readOnlyRootFilesystem"), "worker: readOnlyRootFilesystem"),
        (change(*MAIN, "securityContext", "privileged", to=True), "worker: privileged"),
        (change(*MAIN, "ports", 0, "hostPort", to=9090), "worker: hostPort"),
        (change(*MAIN, "volumeMounts", 1), "/tmp is not a directory of the worker's own"),
        (change(*MAIN, "volumeMounts", 1, "subPath"), "/tmp is not a directory of the worker's own"),
        (change(*POD, "initContainers", 0, "command", 3, to="0777"), "/tmp is not a directory of the worker's own"),
        (change(*MAIN, "resources", "limits", "memory"), "worker: no limit"),
        (change(*MAIN, "resources", "requests", "memory"), "worker: no request"),
        (change(*POD, "volumes", 0, "emptyDir", "sizeLimit", to="8Gi"), "shared memory does not fit"),
        (change(*POD, "volumes", 1, "emptyDir", "sizeLimit"), "a volume without sizeLimit"),
        (change(*WORKER, "progressDeadlineSeconds"), "progressDeadlineSeconds is over before the startup probe"),
        (
            change(*MAIN, "startupProbe", "failureThreshold", to=6),
            "the startup probe is over before --discovery-timeout",
        ),
        (
            change(*MAIN, "livenessProbe", "failureThreshold", to=2),
            "the liveness probe is over before --heartbeat-timeout",
        ),
        (change(*MAIN, "livenessProbe", "httpGet", "path", to="/health"), "paths of the probes"),
        (change(*MAIN, "readinessProbe", "httpGet", "port", to="statsu"), "a probe's port does not exist"),
        (change(*POD, "terminationGracePeriodSeconds"), "--termination-grace-period is not the pod's"),
        (
            change(*MAIN, "lifecycle", to={"preStop": {"sleep": {"seconds": 5}}}),
            "--termination-grace-period is not the pod's",
        ),
        (change(*FRONTEND, "env", 1, "value", to="60"), "streams do not fit into the grace period"),
        (change(*WORKER, "selector", "matchLabels", "tier", to="gpu"), "dynamo-worker: its selector does not match"),
        (
            change("PodDisruptionBudget", "dynamo-worker", "spec", "maxUnavailable", to=2),
            "dynamo-worker: no disruption budget",
        ),
        (change(*WORKER, "replicas", to=1), "dynamo-worker: no disruption budget"),
        (change(*POD, "topologySpreadConstraints"), "dynamo-worker: not spread over nodes"),
        (change(*POD, "serviceAccountName"), "dynamo-worker: no service account of its own"),
        (change(*POD, "automountServiceAccountToken", to=True), "dynamo-worker: a token that nothing needs"),
        (change(*MAIN, "env", 1, "value", to="9100"), "requests"),
        (change(*MAIN, "env", 0, "value", to="9100"), "status"),
        (change(*FRONTEND, "env", 0, "value", to="9100"), "answers"),
        (change(*NETWORK, "ingress", 0, "ports", 0), "refused: ('dynamo-worker', 'ingress', 'dynamo-frontend', 9091)"),
        (change(*NETWORK, "egress", 0), "refused: ('dynamo-worker', 'egress', 'dynamo-frontend', 9092)"),
        (change(*NETWORK, "ingress", 1), "refused: ('dynamo-worker', 'ingress', 'monitoring', 9090)"),
        (
            change(*NETWORK, "ingress", 1, "from", to=[{"podSelector": {}}]),
            "needless: ('dynamo-worker', 'ingress', '', 9090)",
        ),
        (change("NetworkPolicy", "dynamo-dns", "spec", "egress", 0), "refused: ('dynamo', 'egress', 'kube-dns', 53)"),
        (
            change("NetworkPolicy", "dynamo-discovery", "spec", "egress", 0),
            "refused: ('dynamo', 'egress', 'etcd', 2379)",
        ),
    ],
)
def test_a_wrong_manifest_does_not_pass(seed: Callable[[list[dict[str, Any]]], None], objection: str) -> None:
    documents = copy.deepcopy(DOCUMENTS)
    seed(documents)
    assert objection in review(documents)


def granted(documents: list[dict[str, Any]], account: str) -> set[tuple[str, str]]:
    """Return the resources and verbs of a service account."""
    roles = {each["metadata"]["name"]: each["rules"] for each in policy.kind(documents, "Role")}
    bound = [
        each for each in policy.kind(documents, "RoleBinding") if account in {one["name"] for one in each["subjects"]}
    ]
    rules = [rule for each in bound for rule in roles[each["roleRef"]["name"]]]
    return {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


def test_accounts_may_do_what_discovery_needs_and_no_more() -> None:
    assert granted(ACCESS, "dynamo-worker") == READ | WRITE
    assert granted(ACCESS, "dynamo-frontend") == READ
    assert {each["kind"] for each in ACCESS} == {"Service", "Role", "RoleBinding"}
    accounts = {each["metadata"]["name"] for each in policy.kind(DOCUMENTS, "ServiceAccount")}
    for each in policy.kind(ACCESS, "RoleBinding"):
        assert {one["name"] for one in each["subjects"]} <= accounts


def test_the_runtime_finds_the_slices_of_the_workers() -> None:
    """It asks for EndpointSlices with these labels, which they inherit from their Service."""
    (service,) = policy.kind(ACCESS, "Service")
    assert service["metadata"]["labels"] == {
        "nvidia.com/dynamo-discovery-backend": "kubernetes",
        "nvidia.com/dynamo-discovery-enabled": "true",
    }
    worker = next(each for each in policy.kind(DOCUMENTS, "Deployment") if each["metadata"]["name"] == "dynamo-worker")
    assert service["spec"]["selector"] == worker["spec"]["selector"]["matchLabels"]
    assert not service["spec"].get("publishNotReadyAddresses")


@pytest.mark.parametrize("name", ["worker", "frontend"])
def test_with_kubernetes_discovery_a_pod_knows_itself(name: str) -> None:
    (patch,) = load(DEPLOY / "kubernetes-discovery" / f"{name}.yaml")
    pod = patch["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is True
    (container,) = pod["containers"]
    given = {each["name"]: each for each in container["env"]}
    assert given["DYN_DISCOVERY_BACKEND"]["value"] == "kubernetes"
    assert given["ETCD_ENDPOINTS"]["$patch"] == "delete"
    fields = {
        name: given[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in ("POD_NAME", "POD_NAMESPACE", "POD_UID")
    }
    assert fields == {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace", "POD_UID": "metadata.uid"}
    assert container["name"] == policy.deployed(DOCUMENTS, patch["metadata"]["name"])["name"]


def test_the_worker_accepts_its_arguments_and_variables() -> None:
    container = policy.deployed(DOCUMENTS, "dynamo-worker")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "ETCD_"))}
    command = [sys.executable, "-m", "dynamo_worker", *container["args"], "--print-config"]
    done = subprocess.run(
        command, env={**clean, **policy.environment(container)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for setting in ("9090", "etcd", "60"):
        assert setting in done.stdout
