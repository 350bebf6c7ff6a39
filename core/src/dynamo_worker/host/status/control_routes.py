"""The control routes ``/engine/NAME`` of the status server: access checks and dispatch.

Each is also reached as ``/engine/control/NAME``, where Dynamo's own workers have such routes and answer like them.

They put a worker to sleep, load weights and write profiles, and nothing but the network protects them. So a web page
must not reach them through a visitor's browser, and an operator can require a token.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import json
import os
import socket
import stat
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from dynamo_worker.containment import contained
from dynamo_worker.engine import LargeOperation
from dynamo_worker.errors import UsageError, describe, for_client
from dynamo_worker.host.status import http_message
from dynamo_worker.host.status.http_message import HttpError
from dynamo_worker.host.status.peer_routes import REFUSED
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dynamo_worker.engine import Operation
    from dynamo_worker.host.status.http_message import RequestHead

log = get_logger(__name__)

#: The environment variable that can hold the token.
TOKEN_ENV: Final = "DYN_WORKER_CONTROL_TOKEN"  # noqa: S105 - its name
#: What the names of routes begin with in Dynamo's own workers.
PEER_PREFIX: Final = "control/"
#: Most operations at once, including those whose clients have left.
_MOST_OPERATIONS = 16
#: Longest token file in bytes: a header has no room for more.
_MOST_TOKEN_BYTES = 4096


class ControlAccess:
    """Decides who may call the control routes."""

    def __init__(self, token: str | None = None) -> None:
        """Admit clients that know the token; without a token, all but web pages."""
        self._token = None if token is None else token.encode()
        self._names = {"localhost", socket.gethostname().lower()}

    def check(self, head: RequestHead) -> None:
        """Check that a request may be executed.

        :raises HttpError: it may not.
        """
        # Without a preflight a page may only send GET to another origin, or POST with one of three other types.
        if head.method != "POST":
            raise HttpError("405 Method Not Allowed", "control routes are called with POST", "allow: POST")
        content_type = (head.header("content-type") or "").split(";", 1)[0].strip().lower()
        if content_type != "application/json":
            raise HttpError("415 Unsupported Media Type", "send JSON, with `content-type: application/json`")
        host = head.header("host") or ""
        origin = head.header("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise HttpError("403 Forbidden", f"pages of {origin!r:.80} may not call control routes")
        if self._token is not None:
            self._check_token(head.header("authorization") or "")
        elif not self._is_ours(host):
            # A page whose own name resolves to this machine (DNS rebinding) calls its own host. It knows no token.
            raise HttpError(
                "403 Forbidden",
                f"{host!r:.80} is not a name of this machine; call it by its address, or set a control token",
            )

    def _check_token(self, authorization: str) -> None:
        assert self._token is not None
        scheme, _, token = authorization.partition(" ")
        # latin-1 is how the header was decoded.
        known = hmac.compare_digest(token.strip().encode("latin-1"), self._token)
        if scheme.lower() != "bearer" or not known:
            raise HttpError(
                "401 Unauthorized",
                "control routes require the control token: `Authorization: Bearer TOKEN`",
                "www-authenticate: Bearer",
            )

    def _is_ours(self, host: str) -> bool:
        """Return whether a Host header names this machine in a way that DNS cannot forge."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


def read_token(path: Path | None) -> str | None:
    """Return the control token from its file or its variable, or None without either.

    :raises UsageError: both are set, the file cannot be read, or the token cannot be sent in a header.
    """
    given = os.environ.get(TOKEN_ENV)
    if path is None:
        if given is None:
            return None
        where, token = TOKEN_ENV, given
    elif given is not None:
        raise UsageError(f"--control-token-file and {TOKEN_ENV} are both set", hint="set one of them")
    else:
        where = f"--control-token-file {path}"
        try:
            token = _token_in(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"{where}: the token cannot be read: {reason}") from error
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"{where}: the token must be one word of printable ASCII characters",
            hint="create one with `openssl rand -hex 32`",
        )
    return token


def _token_in(path: Path) -> str:
    """Return the content of a token file. Links are followed: volumes of Kubernetes have them.

    :raises OSError: it cannot be read, is not a regular file, is too long, or all users may write to it.
    """
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
            raise PermissionError(errno.EPERM, "All users may write to it (chmod o-w)")
        content = file.read(_MOST_TOKEN_BYTES + 1)
    if len(content) > _MOST_TOKEN_BYTES:
        raise OSError(errno.EFBIG, f"It is longer than {_MOST_TOKEN_BYTES} bytes")
    return content.decode()


class ControlRoutes:
    """The control routes of one engine."""

    def __init__(self, routes: Mapping[str, Operation], access: ControlAccess) -> None:
        self._routes = routes
        self._access = access
        self._running: set[asyncio.Task[dict[str, Any]]] = set()

    def most_body_bytes(self, name: str, head: RequestHead) -> int:
        """Return the size of the largest body that a route takes; 0 if it says nothing.

        :raises HttpError: this client may not call routes.
        """
        self._access.check(head)
        # Also under the prefix of Dynamo's own routes.
        operation = self._routes.get(name) or self._routes.get(name.removeprefix("control/"))
        return operation.most_body_bytes if isinstance(operation, LargeOperation) else 0

    async def call(self, name: str, head: RequestHead, body: bytes) -> bytes:
        """Call a route and return the answer. An operation continues if its client leaves.

        :raises HttpError: the request is refused.
        """
        self._access.check(head)
        operation = self._operation(name)
        if operation is None:
            refusal = REFUSED.get(name) or REFUSED.get(PEER_PREFIX + name)
            if refusal is not None:
                raise HttpError("501 Not Implemented", f"{name}: {refusal}")
            known = ", ".join(sorted(self._routes)) or "none"
            raise HttpError("404 Not Found", f"unknown control route {name!r:.80}; expected one of: {known}")
        try:
            arguments = json.loads(body) if body else {}
        except (ValueError, RecursionError) as error:
            raise HttpError("400 Bad Request", f"the body is not JSON: {error}") from error
        if len(self._running) >= _MOST_OPERATIONS:
            raise HttpError(
                "503 Service Unavailable", f"{len(self._running)} operations are already running", "retry-after: 5"
            )
        task = asyncio.ensure_future(contained(lambda: operation(arguments)))
        self._running.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait({task})
        try:
            return http_message.answer("200 OK", task.result())
        except (Exception, asyncio.CancelledError) as error:
            raise HttpError("500 Internal Server Error", for_client(describe(error))) from error

    def _operation(self, name: str) -> Operation | None:
        """Return the operation of a route; None if there is none."""
        operation = self._routes.get(name)
        if operation is None and name.startswith(PEER_PREFIX):
            own = self._routes.get(name.removeprefix(PEER_PREFIX))
            return None if own is None else _like_the_peer(own)
        return operation

    def _ended(self, task: asyncio.Task[dict[str, Any]]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.warning("Control operation failed", error=error)


def _like_the_peer(operation: Operation) -> Operation:
    """Return an operation that says ``ok`` where ours says ``success``."""

    async def answer(body: Any) -> dict[str, Any]:
        result = await operation(body)
        return {**result, "status": "ok"} if result.get("status") == "success" else result

    return answer
