"""Withdraws the registration of a dead worker, so no router sends it another request."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import Any

#: Seconds to wait for one etcd endpoint.
_ETCD_TIMEOUT = 1.5
#: Bytes read of one answer: a value of etcd's default limit (1.5 MiB) in base64 fits.
_MOST_BYTES = 4 << 20

#: Where the runtime looks when ``ETCD_ENDPOINTS`` is not set.
DEFAULT_ETCD = "http://localhost:2379"

#: 64 random bits in hexadecimal digits. Shorter ones could be part of other names.
_INSTANCE = re.compile(r"[0-9a-f]{8,16}")


def etcd_endpoints() -> list[str]:
    """Return etcd's addresses from the environment. Our password goes to no others."""
    return addresses("ETCD_ENDPOINTS", DEFAULT_ETCD)


def addresses(variable: str, default: str) -> list[str]:
    """Return the comma-separated addresses of an environment variable."""
    text = os.environ.get(variable, "").strip(", ") or default
    return [address.strip() for address in text.split(",") if address.strip()]


def withdraw(registration: dict[str, Any], deadline: float, root: str | None = None) -> str:
    """Withdraw one recorded registration and describe what was done. Blocks; never raises.

    :param registration: an entry of the ledger.
    :param deadline: when to give up (monotonic).
    :param root: the only directory of the ``file`` backend in which files may be removed; None: any, for records that
        only our own worker can have written.
    """
    backend = registration.get("backend")
    try:
        if backend == "file":
            recorded = str(registration["root"])
            if root is not None and os.path.realpath(recorded) != os.path.realpath(root):
                return f"file: left to expire: {recorded} is not the discovery directory of this worker"
            return _withdraw_file(recorded, _instance(registration))
        if backend == "etcd":
            return _withdraw_etcd(int(_instance(registration), 16), deadline)
    except Exception as error:  # the other registrations and the rest of the cleanup continue
        return f"{backend}: failed: {type(error).__name__}: {error}"
    return f"{backend}: nothing to withdraw from outside"


def _instance(registration: dict[str, Any]) -> str:
    """Return the recorded instance id.

    :raises ValueError: the runtime gives no such id.
    """
    instance = str(registration["instance"])
    if not _INSTANCE.fullmatch(instance):
        raise ValueError(f"{instance[:40]!r} is not an instance id")
    return instance


def _withdraw_file(root: str, instance: str) -> str:
    """Unlink every file below ``root`` with the instance id in its name; routers notice within milliseconds."""
    # As a whole word: in names it follows an escaped slash, `%2F`.
    named = re.compile(rf"(?:^|%[0-9A-Fa-f]{{2}}|[^0-9A-Fa-f]){instance}(?![0-9a-f])")
    removed = 0
    with contextlib.suppress(FileNotFoundError):  # nothing was registered there
        for _, _, names, directory in os.fwalk(os.path.realpath(root)):
            for name in filter(named.search, names):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
                    removed += 1
    return f"file: {removed} files removed"


def _withdraw_etcd(lease: int, deadline: float) -> str:
    """Revoke the lease, which removes all of the worker's keys at once. The first endpoint that answers decides."""
    failures = []
    for endpoint in etcd_endpoints():
        timeout = min(_ETCD_TIMEOUT, deadline - time.monotonic())
        if timeout <= 0:
            failures.append("no time left")
            break
        try:
            return _revoke(str(endpoint), lease, timeout)
        except Exception as error:
            failures.append(f"{endpoint}: {error}")
    raise OSError("; ".join(failures))


def etcd_headers(endpoint: str, timeout: float) -> dict[str, str]:
    """Return the headers for etcd's gateway, authenticated if a user is configured.

    :raises OSError: the gateway did not answer, or rejected the user.
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
