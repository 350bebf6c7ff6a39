"""The custom resource of a worker's pod, through the Kubernetes API: where the ``kubernetes`` backend keeps entries."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Final
from urllib.parse import quote

from dynamo_worker.supervisor import http_request

#: Where Kubernetes puts the credentials of a pod.
_CREDENTIALS = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Where the operator mounts what a pod is called.
_POD_INFO = "/etc/podinfo"
#: Longest name in characters.
_MOST_NAME = 1000
#: The container whose resource has the name of its pod (measured on 1.6.1).
_MAIN = "main"
#: Longest credential in bytes.
_MOST_BYTES = 1 << 20
_RESOURCES = "/apis/nvidia.com/v1alpha1/namespaces/{namespace}/dynamoworkermetadatas"
#: What the runtime writes for a pod without entries (1.6.1).
_NOTHING: dict[str, object] = {"endpoints": {}, "model_cards": {}, "event_channels": {}, "event_sources": {}}
#: How the runtime writes (1.6.1). An owner of fields of another name would keep them when the runtime removes them.
_APPLY: Final = "?force=true&fieldManager=dynamo-worker"
_JSON: Final = "application/json"


class KubernetesError(OSError):
    """The Kubernetes API refuses a call.

    :ivar status: the HTTP status.
    :ivar missing: the name of the object that does not exist; None if it is something else that does not.
    """

    def __init__(self, message: str, status: int, missing: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.missing = missing


def in_cluster() -> bool:
    """Return whether this process runs in a pod, with the credentials that Kubernetes gives to pods."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and os.path.exists(f"{_CREDENTIALS}/token")


def address() -> str:
    """Return host and port of the API server."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT") or "443"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check(deadline: float) -> None:
    """List what this pod must be able to list. Blocks.

    :param deadline: when to give up (monotonic).
    :raises KubernetesError: the API refuses.
    :raises OSError: it does not answer.
    """
    _call("GET", "?limit=1", b"", _JSON, deadline)


def read(deadline: float) -> dict[str, Any] | None:
    """Return the custom resource to which the runtime of this process writes; None if it does not exist. Blocks.

    :param deadline: when to give up (monotonic).
    :raises KubernetesError: the API refuses, or does not know such resources at all.
    :raises OSError: it does not answer, or with something else.
    """
    name = resource()
    try:
        return _call("GET", f"/{name}", b"", _JSON, deadline)
    except KubernetesError as error:
        if error.status == 404 and error.missing == name:
            return None
        raise


def apply(metadata: dict[str, Any], data: dict[str, Any], deadline: float) -> None:
    """Write the entries of this pod as its runtime would, in place of those that are there. Blocks.

    :param metadata: of the custom resource; with a ``resourceVersion`` nothing is written over a later version.
    :param data: the entries.
    :param deadline: when to give up (monotonic).
    :raises OSError: the API does not answer, or refuses.
    """
    named = {**metadata, "name": resource()}
    whole = {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoWorkerMetadata",
        "metadata": named,
        "spec": {"data": data},
    }
    content = json.dumps(whole).encode()
    _call("PATCH", f"/{resource()}{_APPLY}", content, "application/apply-patch+yaml", deadline)


def sample(count: int, deadline: float) -> list[Any]:
    """Return the custom resources of some pods of this namespace. Blocks.

    :param count: how many at most.
    :param deadline: when to give up (monotonic).
    :raises OSError: the API does not answer, or refuses.
    """
    return page(count, "", deadline)[0]


def page(count: int, after: str, deadline: float) -> tuple[list[Any], str]:
    """Return the custom resources of the next pods of this namespace, and where those after them begin. Blocks.

    :param count: how many at most.
    :param after: what the page before returned; empty for the first one.
    :param deadline: when to give up (monotonic).
    :returns: the resources, and the beginning of the next page, which is empty after the last one.
    :raises OSError: the API does not answer, or refuses.
    """
    answer = _call("GET", f"?limit={count}{after and f'&continue={quote(after)}'}", b"", _JSON, deadline)
    items, metadata = answer.get("items"), answer.get("metadata")
    rest = metadata.get("continue") if isinstance(metadata, dict) else None
    return items if isinstance(items, list) else [], rest if isinstance(rest, str) else ""


def withdraw(deadline: float) -> str:
    """Empty the custom resource of this pod, or of this container; return what was done. Blocks.

    It stays, with its owner: the runtime of the next container in this pod writes to it. Only a ``patch`` is needed,
    which the runtime may do in any case.

    :param deadline: when to give up (monotonic).
    :raises OSError: the API does not answer, or refuses.
    """
    if not in_cluster():
        return "kubernetes: nothing to withdraw from outside: this process has no credentials of a pod"
    change = [{"op": "replace", "path": "/spec/data", "value": _NOTHING}]
    try:
        _call("PATCH", f"/{resource()}", json.dumps(change).encode(), "application/json-patch+json", deadline)
    except KubernetesError as error:
        if error.status != 404:
            raise
        return "kubernetes: nothing registered"
    return "kubernetes: entries removed"


def resource() -> str:
    """Return the name of the custom resource to which the runtime of this process writes."""
    pod, container = _pod("name"), os.environ.get("CONTAINER_NAME", "")
    per_container = os.environ.get("DYN_KUBE_DISCOVERY_MODE") == "container"
    return f"{pod}-{container}" if per_container and container not in ("", _MAIN) else pod


def _pod(what: str) -> str:
    """Return the pod's ``name`` or ``namespace`` as the runtime finds it: in a mounted file, or in a variable."""
    with contextlib.suppress(OSError), open(f"{_POD_INFO}/pod_{what}", encoding="utf-8") as file:
        found = file.read(_MOST_NAME).strip()
        if found:
            return found
    return os.environ.get(f"POD_{what.upper()}", "")


def _call(method: str, path: str, content: bytes, kind: str, deadline: float) -> dict[str, Any]:
    import ssl

    with open(f"{_CREDENTIALS}/token", encoding="ascii") as file:
        token = file.read(_MOST_BYTES).strip()
    tls = ssl.create_default_context(cafile=f"{_CREDENTIALS}/ca.crt")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": kind, "Accept": _JSON}
    base = _RESOURCES.format(namespace=_pod("namespace") or "default")
    status, text = http_request.send(method, address(), base + path, content, headers, deadline, tls)
    answer = _object(text)
    if status not in (200, 201):
        details = answer.get("details")
        missing = details.get("name") if isinstance(details, dict) else None
        message = str(answer.get("message", "")) or text[:200].decode("utf-8", "replace")
        raise KubernetesError(message or f"HTTP status {status}", status, missing)
    if not answer:
        raise OSError(f"not a Kubernetes API: it answers {text[:40]!r}")
    return answer


def _object(text: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if it is none."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
