"""The control routes: who may call them, from where, and what becomes of a call."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from aio import until

from dynamo_worker.errors import UsageError
from dynamo_worker.host.status.control_routes import TOKEN_ENV, ControlAccess, ControlRoutes, read_token
from dynamo_worker.host.status.http_message import HttpError, RequestHead

GOOD = {"host": "127.0.0.1:9090", "content-type": "application/json"}


def head(method: str = "POST", **changes: str | None) -> RequestHead:
    """Return the head of a good request, with some headers changed or left out."""
    headers = {**GOOD, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return RequestHead(method, "/engine/sleep", {name: [value] for name, value in headers.items() if value is not None})


def refusal(access: ControlAccess, request: RequestHead) -> int | None:
    """Return the status with which a request is refused, None if it is not."""
    try:
        access.check(request)
    except HttpError as error:
        return int(error.status.split()[0])
    return None


# ---------------------------------------------------------------------------------------------------------- who may


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "post", ""])
def test_only_post(method: str) -> None:
    assert refusal(ControlAccess(), head(method)) == 405


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", None),
        ("Application/JSON; charset=utf-8", None),
        # The three that a page may send without asking first, and what passes for JSON in a sloppy look.
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=application/json", 415),
        ("text/plain; application/json", 415),
        ("", 415),
        (None, 415),
    ],
)
def test_only_json(content_type: str | None, expected: int | None) -> None:
    assert refusal(ControlAccess(), head(content_type=content_type)) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", None),
        ("LOCALHOST:9090", None),
        ("10.1.2.3:9090", None),
        ("[::1]:9090", None),
        (socket.gethostname(), None),
        # A name that its owner's server resolves to 127.0.0.1 (DNS rebinding).
        ("evil.example:9090", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@localhost:9090@evil.example", 403),
        ("[::1", 403),
        ("", 403),
        (None, 403),
    ],
)
def test_the_host_must_be_ours(host: str | None, expected: int | None) -> None:
    assert refusal(ControlAccess(), head(host=host)) == expected


@pytest.mark.parametrize("token", [None, "secret"])
@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, None),
        ("http://127.0.0.1:9090", None),
        ("http://evil.example", 403),
        ("http://127.0.0.1:8000", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_foreign_pages_may_not(origin: str | None, expected: int | None, token: str | None) -> None:
    assert refusal(ControlAccess(token), head(origin=origin, authorization=f"Bearer {token}")) == expected


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("Bearer sécret", 401),
        ("Bearer secret", None),
        ("bearer secret", None),
        ("Bearer  secret ", None),
        ("Bearer Secret", 401),
        ("Bearer secre", 401),
        ("Bearer secret1", 401),
        ("Bearer", 401),
        ("Basic secret", 401),
        ("secret", 401),
        (None, 401),
    ],
)
@pytest.mark.parametrize("host", ["localhost", "worker-0.workers.svc:9090"])
def test_who_has_the_token_may_call_us_by_any_name(authorization: str | None, expected: int | None, host: str) -> None:
    """A page that has a name of its own resolve to us does not know it."""
    assert refusal(ControlAccess("secret"), head(host=host, authorization=authorization)) == expected


@pytest.mark.parametrize("name", ["host", "origin", "content-type", "authorization"])
def test_two_headers_of_a_kind_are_refused(name: str) -> None:
    """Whoever stands in front of us may have looked at the other one."""
    request = RequestHead("POST", "/engine/x", {**{k: [v] for k, v in GOOD.items()}, name: ["localhost", "evil"]})
    assert refusal(ControlAccess("secret"), request) == 400


# -------------------------------------------------------------------------------------------------------- the token


def test_the_token_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert read_token(file) == "from-file"
    monkeypatch.setenv(TOKEN_ENV, "from-variable")
    assert read_token(None) == "from-variable"
    with pytest.raises(UsageError, match="both"):
        read_token(file)


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", "schlüssel".encode(), b"\xff", b"a\0b"])
def test_a_token_that_protects_nothing_or_cannot_be_sent(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one would let everybody in who sends an empty one."""
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_token(file)
    assert str(file) in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("planted", ["fifo", "directory", "without end", "others may write"])
def test_a_token_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """Neither blocks the start nor is believed."""
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    file = tmp_path / "token"
    if planted == "fifo":
        os.mkfifo(file)
    elif planted == "directory":
        file.mkdir()
    elif planted == "without end":
        file.touch()
        os.truncate(file, 1 << 40)
    else:
        file.write_text("token")
        file.chmod(0o646)
    with pytest.raises(UsageError, match="the token cannot be read: "):
        read_token(file)


def test_a_token_file_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a volume of Kubernetes, which can be exchanged as a whole."""
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    (tmp_path / "data").write_text("token\n")
    (tmp_path / "token").symlink_to("data")
    assert read_token(tmp_path / "token") == "token"


def test_a_token_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    with pytest.raises(UsageError, match="No such file"):
        read_token(tmp_path / "none")


def test_an_empty_variable_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "")
    with pytest.raises(UsageError, match=TOKEN_ENV):
        read_token(None)


# --------------------------------------------------------------------------------------------------------- the calls


async def echo(body: dict[str, Any]) -> dict[str, Any]:
    return {"got": body}


def call(operation: Any, body: bytes = b"", name: str = "sleep") -> tuple[int, dict[str, Any]]:
    """Call a route and return status and body of the answer."""

    async def main() -> bytes:
        try:
            return await ControlRoutes({"sleep": operation}, ControlAccess()).call(name, head(), body)
        except HttpError as error:
            return error.encode()

    first, _, content = asyncio.run(main()).partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(content)


@pytest.mark.parametrize(("body", "got"), [(b"", {}), (b'{"level": 1}', {"level": 1}), (b"[1]", [1])])
def test_the_body_is_the_operations_argument(body: bytes, got: Any) -> None:
    assert call(echo, body) == (200, {"got": got})


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 60_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    status, answer = call(echo, body)
    assert status == 400
    assert "is not JSON" in answer["message"]


def test_an_unknown_route_says_which_there_are() -> None:
    assert call(echo, name="nap") == (
        404,
        {"status": "error", "message": "unknown control route 'nap'; expected one of: sleep"},
    )


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), ValueError("x" * 9999), SystemExit(3), asyncio.CancelledError()],
    ids=lambda error: f"{error!r:.20}",
)
def test_an_operation_that_fails_is_an_answer(error: BaseException) -> None:
    async def fail(body: dict[str, Any]) -> dict[str, Any]:
        raise error

    status, answer = call(fail)
    assert status == 500
    assert answer["status"] == "error"
    assert len(answer["message"]) <= 1001


@pytest.mark.parametrize("result", [{"a": object()}, {"a": {1, 2}}, object()])
def test_an_answer_that_is_no_json(result: Any) -> None:
    async def strange(body: dict[str, Any]) -> Any:
        return result

    assert call(strange)[0] == 500


def test_an_operation_goes_on_when_its_client_leaves_and_there_is_a_limit() -> None:
    async def main() -> None:
        go_on, ended = asyncio.Event(), []

        async def slow(body: dict[str, Any]) -> dict[str, Any]:
            await go_on.wait()
            ended.append(body)
            return {}

        routes = ControlRoutes({"sleep": slow}, ControlAccess())
        clients = [asyncio.ensure_future(routes.call("sleep", head(), b"{}")) for _ in range(16)]
        await until(lambda: len(routes._running) == 16)
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        with pytest.raises(HttpError, match="16 operations are already running"):
            await routes.call("sleep", head(), b"{}")
        go_on.set()
        await until(lambda: len(ended) == 16)
        await until(lambda: not routes._running)
        assert b"200 OK" in await routes.call("sleep", head(), b"{}")

    asyncio.run(main())


# ------------------------------------------------------------------------------------------- as in Dynamo's own workers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sleep", {"status": "success", "level": 2}),
        ("control/sleep", {"status": "ok", "level": 2}),
        ("control/broken", {"status": "error", "message": "no"}),
        ("control/drain", {"status": "success", "own": True}),
    ],
)
def test_routes_have_the_peers_names_and_answers_too(name: str, expected: dict[str, Any]) -> None:
    async def sleep(body: dict[str, Any]) -> dict[str, Any]:
        return {"status": "success", "level": body["level"]}

    async def broken(_: Any) -> dict[str, Any]:
        return {"status": "error", "message": "no"}

    async def drain(_: Any) -> dict[str, Any]:
        return {"status": "success", "own": True}

    routes = ControlRoutes({"sleep": sleep, "broken": broken, "control/drain": drain}, ControlAccess())
    answer = asyncio.run(routes.call(name, head(), b'{"level": 2}'))
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == expected


@pytest.mark.parametrize("name", ["control/nap", "control/control/sleep", "control/", "controls/sleep"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(HttpError, match="unknown control route"):
        asyncio.run(ControlRoutes({"sleep": None}, ControlAccess()).call(name, head(), b"{}"))  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["control/scale_elastic_ep", "scale_elastic_ep", "control/ep_capacity"])
def test_what_is_not_supported_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(HttpError, match=f"{name}: elastic expert parallelism is not supported: start") as raised:
        asyncio.run(ControlRoutes({}, ControlAccess()).call(name, head(), b"{}"))
    assert raised.value.status.startswith("501")


def test_an_engine_may_have_what_others_lack() -> None:
    async def scale(_: Any) -> dict[str, Any]:
        return {"status": "success"}

    routes = ControlRoutes({"scale_elastic_ep": scale}, ControlAccess())
    assert asyncio.run(routes.call("control/scale_elastic_ep", head(), b"")).endswith(b'{"status": "ok"}')
