"""The name of a pod's resource; the rest is tested with the real runtime in tests/faults/test_kubernetes.py."""

from __future__ import annotations

import time

import pytest

from dynamo_worker.supervisor import kubernetes


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "pod-1"),
        ({"CONTAINER_NAME": "side"}, "pod-1"),
        ({"DYN_KUBE_DISCOVERY_MODE": "pod", "CONTAINER_NAME": "side"}, "pod-1"),
        ({"DYN_KUBE_DISCOVERY_MODE": "container", "CONTAINER_NAME": "side"}, "pod-1-side"),
        ({"DYN_KUBE_DISCOVERY_MODE": "container", "CONTAINER_NAME": "main"}, "pod-1"),
    ],
)
@pytest.mark.parametrize("mounted", [True, False])
def test_the_name_of_the_resource(monkeypatch, tmp_path, variables, name, mounted):
    for variable in ("DYN_KUBE_DISCOVERY_MODE", "CONTAINER_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"POD_NAME": "another" if mounted else "pod-1", **variables}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(kubernetes, "_POD_INFO", str(tmp_path))
    if mounted:
        (tmp_path / "pod_name").write_text("pod-1\n")
    assert kubernetes.resource() == name


def test_the_address_of_the_api(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.delenv("KUBERNETES_SERVICE_PORT", raising=False)
    assert kubernetes.address() == "[fd00::1]:443"


def test_outside_of_a_pod(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert "no credentials of a pod" in kubernetes.withdraw(time.monotonic() + 1)
