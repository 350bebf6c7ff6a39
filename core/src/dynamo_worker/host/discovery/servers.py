"""Waits for the servers that the Dynamo runtime needs: the runtime itself would block the event loop for 120 s.

A server counts as there once it has answered a question: one that only accepts connections would still block the
runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from dynamo_worker.errors import ServerUnreachableError, StartError, UsageError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import kubernetes
from dynamo_worker.supervisor.etcd import DEFAULT_ETCD, EtcdAuthError, EtcdError, Gateway, addresses

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

log = get_logger(__name__)

#: Where the runtime looks when ``NATS_SERVER`` is not set.
_DEFAULT_NATS: Final = "nats://localhost:4222"
#: The user and password that the runtime sends if it is given none, and the variables of other ways to log in.
_NATS_USER: Final = "user"
_NATS_KEYS: Final = ("NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE")
#: Most seconds for one attempt to talk to a server.
_ATTEMPT_SECONDS: Final = 2.0
#: Least seconds for one, and seconds between attempts.
_SHORTEST_ATTEMPT: Final = 0.1
_PAUSE_SECONDS: Final = 0.5
#: Longest first line of a NATS server in bytes.
_MOST_INFO_BYTES: Final = 1 << 16
#: Dynamo's variables for the seconds that the runtime itself waits for a server.
_RUNTIME_WAITS: Final = ("ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS")
_AUTH_HINTS: Final = {
    "etcd": "check ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, and the user's role",
    "the Kubernetes API": "give the pod's service account get, list, watch, create, patch and delete of "
    "dynamoworkermetadatas (nvidia.com), and install Dynamo's custom resources",
    "NATS": "check NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, or NATS_AUTH_TOKEN",
}


_SINGLE: Final = "or use --discovery-backend file on a single machine"
_HINTS: Final = {
    "etcd": f"start it, set ETCD_ENDPOINTS, {_SINGLE}",
    "NATS": f"start it, set NATS_SERVER, {_SINGLE}",
    "the Kubernetes API": "look at the API server, and at the network policies of this pod",
}


class _RejectedError(Exception):
    """A server answers, and rejects our credentials."""


def _host_and_port(address: str, variable: str, default: str) -> tuple[str, int]:
    """Split one server's address; the port defaults to that of ``default``.

    :raises UsageError: it is not an address.
    """
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        return parts.hostname or "localhost", parts.port or urlsplit(default).port or 0
    except ValueError as error:
        raise UsageError(f"{variable}: expected an address, got {address!r}: {error}") from error


async def wait_for_servers(discovery_backend: str, request_plane: str, event_plane: str | None, timeout: float) -> None:
    """Wait until the servers that the runtime needs answer.

    :param timeout: seconds for each of them.
    :raises ServerUnreachableError: one does not answer within ``timeout`` seconds.
    :raises StartError: one rejects our credentials.
    :raises UsageError: an address is malformed.
    """
    if discovery_backend == "etcd":
        servers = _addresses("ETCD_ENDPOINTS", DEFAULT_ETCD)
        await _wait_for_server("etcd", servers, _ask_etcd, timeout)
    if "nats" in (request_plane, event_plane):
        await _wait_for_server("NATS", _addresses("NATS_SERVER", _DEFAULT_NATS), _ask_nats, timeout)
    if discovery_backend == "kubernetes" and kubernetes.in_cluster():
        address = kubernetes.address()
        servers = {address: _host_and_port(address, "KUBERNETES_SERVICE_HOST", "https://:443")}
        await _wait_for_server("the Kubernetes API", servers, _ask_kubernetes, timeout)
    for variable in _RUNTIME_WAITS:
        os.environ.setdefault(variable, str(max(1, round(timeout))))


def _addresses(variable: str, default: str) -> dict[str, tuple[str, int]]:
    """Return host and port of each address in an environment variable.

    :raises UsageError: one is not an address.
    """
    return {address: _host_and_port(address, variable, default) for address in addresses(variable, default)}


async def _wait_for_server(
    name: str,
    servers: Mapping[str, tuple[str, int]],
    ask: Callable[[str, str, int, float], Awaitable[None]],
    timeout: float,
) -> None:
    """Wait until one of a server's addresses answers.

    :param servers: host and port of each address.
    :param ask: talks to an address, host and port within some seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    announced = False
    while True:
        problems = []
        for address, (host, port) in servers.items():
            limit = min(_ATTEMPT_SECONDS, max(_SHORTEST_ATTEMPT, deadline - loop.time()))
            try:
                await ask(address, host, port, limit)
            except _RejectedError as error:
                raise StartError(f"{name} at {address} rejects this user: {error}", hint=_AUTH_HINTS[name]) from error
            except OSError as error:
                problems.append(f"{address}: {_connection_problem(error)}")
            else:
                return
        pause = min(_PAUSE_SECONDS, deadline - loop.time())
        if pause > 0:
            if not announced:
                log.warning("Waiting for a server", server=name, tried="; ".join(problems), timeout_s=timeout)
                announced = True
            await asyncio.sleep(pause)
        if deadline - loop.time() < _SHORTEST_ATTEMPT:
            raise ServerUnreachableError(
                f"{name} cannot be reached ({'; '.join(problems)}); waited {timeout:g} s",
                hint=_HINTS[name],
            )


async def _ask_etcd(address: str, _host: str, _port: int, limit: float) -> None:
    """Read a key through etcd's gateway, as the configured user.

    An answer that is not the gateway's counts: the runtime itself speaks another protocol on the same port.
    """
    gateway = Gateway([address], limit, time.monotonic() + limit)
    body = {"key": "djEv", "limit": "1"}
    try:
        await asyncio.get_running_loop().run_in_executor(None, gateway.ask, address, "/v3/kv/range", body)
    except EtcdAuthError as error:
        raise _RejectedError(str(error)) from error
    except EtcdError as error:
        if error.status >= 500:
            raise


async def _ask_kubernetes(_address: str, _host: str, _port: int, limit: float) -> None:
    """List the custom resources of workers."""
    try:
        await asyncio.get_running_loop().run_in_executor(None, kubernetes.check, time.monotonic() + limit)
    except kubernetes.KubernetesError as error:
        if error.status < 500:
            raise _RejectedError(str(error)) from error
        raise


async def _ask_nats(_address: str, host: str, port: int, limit: float) -> None:
    """Read a NATS server's greeting and, where a password or token is configured, log in."""
    try:
        connecting = asyncio.open_connection(host, port, limit=_MOST_INFO_BYTES)
        reader, writer = await asyncio.wait_for(connecting, limit)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise TimeoutError(f"did not accept a connection within {limit:.2g} s") from error
    try:
        await asyncio.wait_for(_greet_nats(reader, writer), limit)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise TimeoutError(f"accepted the connection, but did not answer within {limit:.2g} s") from error
    except ValueError as error:
        raise ConnectionError(f"not a NATS server: {error}") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _greet_nats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read the greeting, and log in unless that takes certificates or keys, which only the runtime has.

    :raises ConnectionError: it is not a NATS server.
    """
    greeting = await reader.readline()
    if not greeting.startswith(b"INFO "):
        raise ConnectionError(f"not a NATS server: it says {greeting[:40]!r}")
    info: Any = json.loads(greeting[5:])
    if info.get("tls_required") or any(map(os.environ.get, _NATS_KEYS)):
        return
    login = {**_nats_login(), "verbose": False, "pedantic": False}
    writer.write(f"CONNECT {json.dumps(login)}\r\nPING\r\n".encode())
    answer = await reader.readline()
    if b"Authorization" in answer:
        raise _RejectedError(answer.decode("utf-8", "replace").strip())


def _nats_login() -> dict[str, str]:
    """Return the credentials that the runtime would send (measured on 1.6.1): it ignores those in the address."""
    user, password = os.environ.get("NATS_AUTH_USERNAME"), os.environ.get("NATS_AUTH_PASSWORD")
    token = os.environ.get("NATS_AUTH_TOKEN")
    if user and password is not None:
        return {"user": user, "pass": password}
    if token:
        return {"auth_token": token}
    return {"user": _NATS_USER, "pass": _NATS_USER}


def _connection_problem(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):  # its numbers are not those of the system
        return f"TLS: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error)
    return str(error) or type(error).__name__
