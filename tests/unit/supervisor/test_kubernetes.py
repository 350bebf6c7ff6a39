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


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """The API's next answer: status and text."""
    for name, text in (("token", "right"), ("ca.crt", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(kubernetes, "_CREDENTIALS", str(tmp_path))
    monkeypatch.setattr(kubernetes, "_POD_INFO", str(tmp_path))
    monkeypatch.setenv("POD_NAME", "pod-1")
    monkeypatch.delenv("DYN_KUBE_DISCOVERY_MODE", raising=False)
    monkeypatch.setattr("ssl.create_default_context", lambda **_: None)
    given = []
    monkeypatch.setattr(kubernetes.http_request, "send", lambda *_: given[-1])
    return given


def test_a_resource_that_does_not_exist_is_told_from_resources_that_nobody_knows(answer):
    """Without its definition, which an upgrade may remove for a while, nobody can say whether it exists."""
    answer.append((404, b'{"message": "not found", "details": {"name": "pod-1"}}'))
    assert kubernetes.read(0.0) is None
    for text in (b"404 page not found", b'{"message": "the server could not find the requested resource"}', b"{}"):
        answer.append((404, text))
        with pytest.raises(kubernetes.KubernetesError) as raised:
            kubernetes.read(0.0)
        assert raised.value.status == 404


@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b"[" * 100_000, b'{"cut": "of', b"\xff"])
def test_an_answer_of_something_else_is_an_error(answer, text):
    answer.append((200, text))
    with pytest.raises(OSError, match="not a Kubernetes API"):
        kubernetes.read(0.0)
    answer.append((500, text))
    with pytest.raises(kubernetes.KubernetesError):
        kubernetes.read(0.0)


def test_a_list_without_items(answer):
    answer.append((200, b'{"items": {}, "more": 1}'))
    assert kubernetes.sample(3, 0.0) == []


def test_pages(answer, monkeypatch):
    asked = []
    monkeypatch.setattr(kubernetes.http_request, "send", lambda *call: asked.append(call[2]) or answer[-1])
    answer.append((200, b'{"items": [1], "metadata": {"continue": "a b&c"}}'))
    assert kubernetes.page(50, "", 0.0) == ([1], "a b&c")
    answer.append((200, b'{"items": [2], "metadata": {"continue": 3}}'))
    assert kubernetes.page(50, "a b&c", 0.0) == ([2], "")
    assert [path.rpartition("?")[2] for path in asked] == ["limit=50", "limit=50&continue=a%20b%26c"]
