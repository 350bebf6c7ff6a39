"""Takes the registration of a dead worker back, so that no router sends it another request."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

#: Longest wait for one etcd endpoint, in seconds.
_ETCD_TIMEOUT = 1.5
#: Most bytes of one answer: a value of etcd's default limit (1.5 MiB), in base64, and more.
_MOST_BYTES = 4 << 20


def withdraw(registration: dict[str, Any], deadline: float) -> str:
    """Withdraw one recorded registration and say in words what was done. Blocks; raises nothing.

    :param registration: an entry of the ledger.
    :param deadline: when to give up (monotonic).
    """
    backend = registration.get("backend")
    try:
        if backend == "file":
            return _withdraw_file(str(registration["root"]), str(registration["instance"]))
        if backend == "etcd":
            return _withdraw_etcd(registration, deadline)
    except Exception as error:  # whatever it is, the other registrations and the rest of the cleaning go on
        return f"{backend}: failed: {type(error).__name__}: {error}"
    return f"{backend}: nothing to withdraw from outside"


def _withdraw_file(root: str, instance: str) -> str:
    """Unlink every file below ``root`` whose name contains the instance id; routers notice within milliseconds."""
    if len(instance) < 8:
        raise ValueError(f"instance id {instance!r} is too short to search for")
    removed = 0
    for directory, _, names in os.walk(root):
        for name in names:
            if instance in name:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))
                    removed += 1
    return f"file: {removed} files removed"


def _withdraw_etcd(registration: dict[str, Any], deadline: float) -> str:
    """Revoke the lease, which removes all of the worker's keys at once; the first endpoint that answers decides."""
    lease = int(registration["lease"]) if "lease" in registration else int(str(registration["instance"]), 16)
    failures = []
    for endpoint in registration["endpoints"]:
        timeout = min(_ETCD_TIMEOUT, deadline - time.monotonic())
        if timeout <= 0:
            failures.append("no time left")
            break
        try:
            return _revoke(str(endpoint), lease, timeout)
        except Exception as error:
            failures.append(f"{endpoint}: {error}")
    raise OSError("; ".join(failures) or "no endpoint recorded")


def etcd_headers(endpoint: str, timeout: float) -> dict[str, str]:
    """Return the headers of requests to etcd's gateway, logged in if there is a user.

    :raises OSError: it does not answer, or refuses the user.
    """
    headers = {"Content-Type": "application/json"}
    user = os.environ.get("ETCD_AUTH_USERNAME")
    if user:
        login = {"name": user, "password": os.environ.get("ETCD_AUTH_PASSWORD", "")}
        status, answer = post(endpoint, "/v3/auth/authenticate", login, headers, timeout)
        if status != 200 or "token" not in answer:
            raise OSError(f"authentication failed: {answer.get('message', status)}")
        headers["Authorization"] = str(answer["token"])
    return headers


def _revoke(endpoint: str, lease: int, timeout: float) -> str:
    headers = etcd_headers(endpoint, timeout)
    status, answer = post(endpoint, "/v3/lease/revoke", {"ID": str(lease)}, headers, timeout)
    if status == 200:
        return "etcd: lease revoked"
    message = str(answer.get("message", answer.get("error", status)))
    if "lease not found" in message:
        return "etcd: lease already gone"
    raise OSError(f"lease not revoked: {message}")


def post(
    endpoint: str, path: str, body: dict[str, Any], headers: dict[str, str], timeout: float
) -> tuple[int, dict[str, Any]]:
    """POST one JSON object to etcd's gateway; return the status and the answer."""
    import http.client
    import json

    scheme, _, address = endpoint.rpartition("://")
    address = address.split("/", 1)[0]
    connection: http.client.HTTPConnection
    if scheme == "https" or (not scheme and "ETCD_AUTH_CA" in os.environ):
        import ssl

        context = ssl.create_default_context(cafile=os.environ.get("ETCD_AUTH_CA"))
        if "ETCD_AUTH_CLIENT_CERT" in os.environ:
            context.load_cert_chain(os.environ["ETCD_AUTH_CLIENT_CERT"], os.environ.get("ETCD_AUTH_CLIENT_KEY"))
        connection = http.client.HTTPSConnection(address, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read(_MOST_BYTES)
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = {"message": text[:200].decode("utf-8", "replace")}
    return response.status, answer if isinstance(answer, dict) else {}
