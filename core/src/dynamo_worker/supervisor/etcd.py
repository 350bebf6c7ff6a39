"""A client of etcd's HTTP gateway: addresses, TLS and users from the environment, as the Dynamo runtime reads them."""

from __future__ import annotations

import json
import math
import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import http_request

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

#: Where the runtime looks when ``ETCD_ENDPOINTS`` is not set.
DEFAULT_ETCD = "http://localhost:2379"

#: Longest certificate or key in bytes.
_MOST_PEM_BYTES = 1 << 20

#: The variables that hold a certificate or a key.
PEM_VARIABLES = ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")

#: What etcd says about a token that it does not know, or no longer.
_TOKEN_TROUBLE = ("auth token", "user name is empty", "revision of auth store is old")


class EtcdError(OSError):
    """The answer of an etcd that refuses a call.

    :ivar status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class EtcdAuthError(EtcdError):
    """Etcd rejects the user, the password or the missing permission."""


def etcd_endpoints() -> list[str]:
    """Return etcd's addresses from the environment. Our password goes to no others."""
    return addresses("ETCD_ENDPOINTS", DEFAULT_ETCD)


def addresses(variable: str, default: str) -> list[str]:
    """Return the comma-separated addresses of an environment variable."""
    text = os.environ.get(variable, "").strip(", ") or default
    return [address.strip() for address in text.split(",") if address.strip()]


def secured(endpoint: str) -> bool:
    """Return whether an endpoint wants TLS."""
    scheme, _, _ = endpoint.rpartition("://")
    return scheme == "https" or (not scheme and bool(os.environ.get("ETCD_AUTH_CA")))


def entries_lease(instance: int) -> int:
    """Return the lease on which a worker's entries hang; the worker's own one, beside that of its runtime.

    :param instance: the worker's instance id, which is the id of the runtime's lease.
    """
    return instance ^ 1 << 62


def pem(variable: str) -> bytes | None:
    """Return the PEM text that a variable holds, or that the file holds which it names; None if it is not set.

    :raises OSError: the file cannot be read, or is too long.
    """
    value = os.environ.get(variable, "")
    if not value.strip():
        return None
    if "-----BEGIN" in value:
        return value.encode()
    with open(value, "rb") as file:
        text = file.read(_MOST_PEM_BYTES + 1)
    if len(text) > _MOST_PEM_BYTES:
        raise OSError(f"{variable}: {value} is longer than any certificate")
    return text


class Gateway:
    """Calls to the first etcd endpoint that answers. Every method blocks.

    :param timeout: seconds for one endpoint to answer one request.
    :param deadline: when to give up (monotonic).
    """

    def __init__(self, endpoints: Sequence[str], timeout: float, deadline: float = math.inf) -> None:
        self._timeout = timeout
        self._deadline = deadline
        self._endpoints = list(endpoints)
        self._headers: dict[str, str] | None = None
        self._tls: ssl.SSLContext | None = None

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the endpoint that answered last, then each of the others once; renew an expired token.

        :raises EtcdAuthError: an etcd rejects the user.
        :raises EtcdError: an etcd refuses the call.
        :raises OSError: none answered; the text says why for each.
        """
        failures = []
        refusal: EtcdError | None = None
        for endpoint in list(self._endpoints):
            try:
                return self.ask(endpoint, path, body)
            except EtcdError as error:
                if not isinstance(error, EtcdAuthError) and error.status < 500:
                    raise
                refusal = error
                failures.append(f"{endpoint}: {error}")
            except OSError as error:
                failures.append(f"{endpoint}: {_words(error)}")
            self._headers = None
            self._endpoints.append(self._endpoints.pop(0))
        text = f"etcd: {'; '.join(failures)}"
        if refusal is not None and len(failures) == 1:
            raise type(refusal)(text, refusal.status)
        raise OSError(text)

    def ask(self, endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask one endpoint; renew an expired token.

        :raises EtcdAuthError: it rejects the user.
        :raises EtcdError: it refuses the call.
        :raises OSError: it cannot be reached, or did not answer in time.
        """
        fresh = self._headers is None
        if self._headers is None:
            self._headers = self._log_in(endpoint)
        status, answer = self.post(endpoint, path, body, self._headers)
        message = str(answer.get("message") or answer.get("error") or status)
        if status != 200 and not fresh and any(trouble in message for trouble in _TOKEN_TROUBLE):
            self._headers = self._log_in(endpoint)
            status, answer = self.post(endpoint, path, body, self._headers)
            message = str(answer.get("message") or answer.get("error") or status)
        if status == 200:
            return answer
        denied = status in (401, 403) or "permission denied" in message or "user name is empty" in message
        raise (EtcdAuthError if denied else EtcdError)(message, status)

    def _log_in(self, endpoint: str) -> dict[str, str]:
        """Return the headers for further requests, with a token if a user is configured.

        :raises EtcdAuthError: the user is rejected.
        """
        headers = {"Content-Type": "application/json"}
        user = os.environ.get("ETCD_AUTH_USERNAME")
        if user:
            login = {"name": user, "password": os.environ.get("ETCD_AUTH_PASSWORD", "")}
            status, answer = self.post(endpoint, "/v3/auth/authenticate", login, headers)
            message = str(answer.get("message") or answer.get("error") or status)
            if status == 200 and "token" in answer:
                headers["Authorization"] = str(answer["token"])
            elif "authentication is not enabled" not in message:
                raise EtcdAuthError(f"authentication failed: {message}", status)
        return headers

    def post(
        self, endpoint: str, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[int, dict[str, Any]]:
        """POST one JSON object; return the status and the answer.

        :raises OSError: the endpoint cannot be reached, or does not speak HTTP.
        """
        deadline = min(time.monotonic() + self._timeout, self._deadline)
        address = endpoint.rpartition("://")[2].split("/", 1)[0]
        if secured(endpoint):
            self._tls = self._tls or tls_context()
        text = json.dumps(body).encode()
        status, answer_text = http_request.send("POST", address, path, text, headers, deadline, self._tls)
        try:
            answer = json.loads(answer_text)
        except ValueError:
            answer = {"message": answer_text[:200].decode("utf-8", "replace")}
        return status, answer if isinstance(answer, dict) else {}


def tls_context() -> ssl.SSLContext:
    """Return the TLS settings from the environment.

    :raises OSError: a certificate or key cannot be read, or is none.
    """
    import ssl

    authority = pem("ETCD_AUTH_CA")
    context = ssl.create_default_context(cadata=authority.decode("ascii", "replace") if authority else None)
    certificate, key = pem("ETCD_AUTH_CLIENT_CERT"), pem("ETCD_AUTH_CLIENT_KEY")
    if certificate:
        # The ssl module reads certificates from files only. This one has no name and stays in memory.
        with open(os.memfd_create("etcd-client"), "wb") as file:
            file.write(certificate + b"\n" + (key or b""))
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


def _words(error: OSError) -> str:
    return str(error) or type(error).__name__
