"""Waits for the servers that the Dynamo runtime needs: the runtime itself would block the event loop for 120 s."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.discovery import DEFAULT_ETCD, addresses

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.host.config.settings import WorkerSettings

log = get_logger(__name__)

#: Where the runtime looks when ``NATS_SERVER`` is not set.
_DEFAULT_NATS: Final = "nats://localhost:4222"
#: Most seconds for one attempt to connect to a server.
_CONNECT_SECONDS: Final = 2.0


def _host_and_port(address: str, variable: str, default: str) -> tuple[str, int]:
    """Split one server's address; the port defaults to that of ``default``.

    :raises UsageError: it is not an address.
    """
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        return parts.hostname or "localhost", parts.port or urlsplit(default).port or 0
    except ValueError as error:
        raise UsageError(f"{variable}: expected an address, got {address!r}: {error}") from error


async def wait_for_servers(settings: WorkerSettings) -> None:
    """Wait until the servers that the runtime needs accept connections.

    :raises StartError: one cannot be reached within ``discovery_timeout``.
    :raises UsageError: an address is malformed.
    """
    needed: list[tuple[str, str, str]] = []
    if settings.discovery_backend == "etcd":
        needed.append(("etcd", "ETCD_ENDPOINTS", DEFAULT_ETCD))
    if "nats" in (settings.request_plane, settings.event_plane):
        needed.append(("NATS", "NATS_SERVER", _DEFAULT_NATS))
    for name, variable, default in needed:
        servers = {address: _host_and_port(address, variable, default) for address in addresses(variable, default)}
        await _wait_for_server(name, variable, servers, settings.discovery_timeout)


async def _wait_for_server(name: str, variable: str, servers: Mapping[str, tuple[str, int]], timeout: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    announced = False
    while True:
        problems = []
        for address, (host, port) in servers.items():
            limit = min(_CONNECT_SECONDS, max(0.05, deadline - loop.time()))
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), limit)
            except (OSError, asyncio.TimeoutError) as error:
                problems.append(f"{address}: {_connection_problem(error)}")
            else:
                writer.close()
                return
        if loop.time() >= deadline:
            raise StartError(
                f"{name} cannot be reached ({'; '.join(problems)}); waited {timeout:g} s",
                hint=f"start it, set {variable}, or use --discovery-backend file on a single machine",
            )
        if not announced:
            log.warning("Waiting for a server", server=name, tried="; ".join(problems), timeout_s=timeout)
            announced = True
        await asyncio.sleep(min(0.5, max(0.05, deadline - loop.time())))


def _connection_problem(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error)
    return str(error) or type(error).__name__
