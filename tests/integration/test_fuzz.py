"""Whatever arrives at a worker's endpoint, status server and control routes: it serves on, and stays as it was.

`DYNAMO_WORKER_TEST_EXAMPLES` says how many examples there are, of four or five requests each, and
`DYNAMO_WORKER_TEST_LIVE` how many seconds ``/live`` may take.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_worker.testing import Cluster

from .watched import EXAMPLES, Client, Watched

FUZZ = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    max_examples=EXAMPLES,
)
#: How many requests an example has: every one is made by itself or beside the others.
AT_ONCE = {"min_size": 4, "max_size": 5}


# ------------------------------------------------------------------------------------------------ the token endpoint

NUMBERS = st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**64 - 1), st.floats())
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.binary(max_size=20))
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5)
)
TOKENS = st.one_of(
    st.lists(st.integers(0, 258), min_size=1, max_size=20),
    st.lists(NUMBERS, max_size=10),
    st.lists(st.integers(0, 258), min_size=1, max_size=20).map(lambda tokens: array.array("i", tokens).tobytes()),
    ANYTHING,
)


def options(*names: str) -> st.SearchStrategy[object]:
    """Return objects with some of these keys, or anything else."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, NUMBERS | ANYTHING)) | ANYTHING


REQUESTS = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {"token_ids": TOKENS},
        optional={
            "model": ANYTHING,
            "stop_conditions": options("max_tokens", "min_tokens", "stop", "stop_token_ids_hidden", "ignore_eos"),
            "sampling_options": options("n", "best_of", "temperature", "top_p", "top_k", "seed", "guided_decoding"),
            "output_options": options("logprobs", "prompt_logprobs", "skip_special_tokens"),
            "eos_token_ids": TOKENS,
            "annotations": ANYTHING,
            "mdc_sum": ANYTHING,
            "router": ANYTHING,
            "extra_args": ANYTHING,
            "lora_name": ANYTHING,
            "multi_modal_data": ANYTHING,
            "prefill_result": ANYTHING,
            "data_parallel_rank": ANYTHING,
        },
    ),
)


def nested(depth: int) -> object:
    """Return lists in lists."""
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


VALID = {"token_ids": [70, 71, 0], "stop_conditions": {"max_tokens": 3}}
#: What hypothesis would not think of: large, deep, and the borders of numbers.
EXTREMES: list[object] = [
    {"token_ids": [70] * 1_000_000},
    {"token_ids": b"\0" * 4_000_000},
    {**VALID, "model": "x" * 5_000_000},
    {**VALID, "extra_args": nested(100)},
    {**VALID, "extra_args": nested(500)},
    {**VALID, "extra_args": {str(number): number for number in range(50_000)}},
    *({**VALID, "stop_conditions": {"max_tokens": value}} for value in (-1, 0, 10**18, math.nan, math.inf, True, "3")),
    *({"token_ids": [value, 70, 0]} for value in (-1, -(2**31), 2**31, 2**63 - 1, 2**64 - 1, True, 1.0, None)),
]


def check_answer(answer: tuple[str, object]) -> None:
    """Check that a request ended as requests do: with a finish reason, or a typed error."""
    kind, what = answer
    assert kind in ("ended", "stopped", "error"), answer
    if kind == "ended":
        assert isinstance(what, dict), answer
        assert what.get("finish_reason"), answer


def check_serving(client: Client) -> None:
    """Check that an ordinary request gets its answer."""
    how, last = client.ask(VALID)[0]
    # What waits together leaves together: the last chunk may hold all three tokens.
    assert (how, last["token_ids"][-1], last["finish_reason"]) == ("ended", 70, "length")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "arguments",
    [(), pytest.param(("--process-tree",), marks=pytest.mark.slow), ("--engine", "strict")],
    ids=["in process", "process tree", "with an engine that reads all of a request"],
)
def test_requests(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    with Watched(cluster, *arguments) as watched, Client(cluster) as client:
        for extreme in EXTREMES:
            check_answer(client.ask(extreme)[0])
        watched.begin()
        asked = itertools.count()

        @FUZZ
        @given(st.lists(REQUESTS, **AT_ONCE))
        def fuzz(requests: list[object]) -> None:
            for answer in client.ask(*requests):
                check_answer(answer)
                next(asked)

        fuzz()
        for extreme in EXTREMES:
            check_answer(client.ask(extreme)[0])
        check_serving(client)
        print(f"\n{next(asked)} requests")
        watched.end()


TEXT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "CD"}], "max_tokens": 3}
#: Bodies of text requests, more or less.
TEXT_REQUESTS = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.just("echo") | ANYTHING,
            "messages": st.just(TEXT["messages"]) | st.lists(st.fixed_dictionaries({"role": ANYTHING}), max_size=3),
            "prompt": st.text(max_size=20) | TOKENS | ANYTHING,
            "max_tokens": st.integers(0, 50) | ANYTHING,
            **dict.fromkeys(("stream", "stream_options", "stop", "n", "temperature", "tools", "nvext"), ANYTHING),
        },
    ),
    st.builds(lambda content: {**TEXT, "messages": [{"role": "user", "content": content}]}, ANYTHING),
)
TEXT_EXTREMES: list[object] = [
    {**TEXT, "messages": [{"role": "user", "content": "x" * 5_000_000}]},
    {**TEXT, "messages": [{"role": "user"}] * 100_000},
    {**TEXT, "messages": [{"role": "user", "content": nested(500)}]},
    {**TEXT, "model": "x" * 5_000_000},
    {**TEXT, "stop": ["ab"] * 100_000},
    {**TEXT, "stop": "x" * 5_000_000},
    {"model": "echo", "prompt": [70] * 1_000_000},
    *({**TEXT, "max_tokens": value} for value in (-1, 10**18, math.nan, math.inf, True, "3")),
]


@pytest.mark.timeout(1800)
def test_text_requests(cluster: Cluster) -> None:
    """A client that skips the frontend may send a text engine anything, too."""

    def check(answer: tuple[str, object]) -> None:
        kind, what = answer
        assert kind in ("ended", "stopped", "error"), answer
        assert kind != "ended" or isinstance(what, dict), answer

    with Watched(cluster, "--text") as watched, Client(cluster) as client:
        for extreme in TEXT_EXTREMES:
            check(client.ask(extreme)[0])
        watched.begin()

        @FUZZ
        @given(st.lists(TEXT_REQUESTS, **AT_ONCE))
        def fuzz(requests: list[object]) -> None:
            for answer in client.ask(*requests):
                check(answer)

        fuzz()
        for extreme in TEXT_EXTREMES:
            check(client.ask(extreme)[0])
        how, last = client.ask(TEXT)[0]
        assert how == "ended", last
        assert last["usage"]["completion_tokens"] == 3
        watched.end()


# -------------------------------------------------------------------------------------------------- the status server

PATHS = st.sampled_from([b"/live", b"/health", b"/metrics", b"/engine/x", b"/", b"*", b"http://x/live", b"//live"])
METHODS = st.sampled_from([b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS", b"CONNECT", b"get", b"", b"\x16\x03\x01"])
HEADERS = st.one_of(
    st.sampled_from(
        [
            b"Host: x",
            b"Host: localhost\r\nContent-Type: application/json",
            b"Origin: http://x",
            b"Authorization: Bearer x",
            b"Connection: keep-alive",
            b"Connection: upgrade\r\nUpgrade: websocket",
            b"Content-Length: 5",
            b"Content-Length: 1000000000000",
            b"Content-Length: -1",
            b"Transfer-Encoding: chunked",
            b"Expect: 100-continue",
            b"X: " + b"y" * 5_000,
            b"X: " + b"y" * 20_000,
        ]
    ),
    st.binary(max_size=60),
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Return what looks like a request, more or less."""
    path = draw(PATHS | st.binary(max_size=30))
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9", b""]))
    lines = [draw(METHODS) + b" " + path + b" " + version, *draw(st.lists(HEADERS, max_size=6))]
    ending = draw(st.sampled_from([b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b"\r\n", b""]))
    body = draw(st.binary(max_size=50) | st.just(b"5\r\nhello\r\n0\r\n\r\n") | st.just(b"z" * 100_000))
    return b"\r\n".join(lines) + ending + body


#: How a client leaves: it reads to the end, at once, with a reset, after half of it, or not until the very end.
LEAVING = st.sampled_from(["reads", "closes", "resets", "shuts down", "stays", "stays", "stays silent"])


def connect(port: int, room: int | None = None) -> socket.socket:
    """Return a connection, with room for so many bytes that it has not read."""
    connection = socket.socket()
    connection.settimeout(5)
    if room is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect(("127.0.0.1", port))
    return connection


def speak(port: int, message: bytes, pieces: int, leaving: str) -> socket.socket | None:
    """Send a message in so many pieces and leave in one of these ways; return a connection that stays."""
    connection = connect(port)
    with contextlib.suppress(OSError):  # it has been refused in the middle of it
        size = max(1, len(message) // pieces)
        for at in range(0, len(message), size):
            connection.sendall(message[at : at + size])
        if leaving == "reads":
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        elif leaving == "shuts down":
            connection.shutdown(socket.SHUT_WR)
            return connection
        elif leaving == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if leaving.startswith("stays"):
            return connection
    connection.close()
    return None


@pytest.mark.timeout(1800)
def test_status_server(cluster: Cluster) -> None:
    with Watched(cluster) as watched:
        port = watched.worker.status_port
        for path in ("/health", "/metrics", "/engine/x") * 5:
            watched.worker.status(path)
        watched.begin()
        staying: list[socket.socket] = []
        asked = itertools.count()

        @FUZZ
        @given(st.lists(st.tuples(messages(), st.integers(1, 5), LEAVING), **AT_ONCE))
        def fuzz(clients: list[tuple[bytes, int, str]]) -> None:
            for message, pieces, leaving in clients:
                next(asked)
                connection = speak(port, message, pieces, leaving)
                if connection is not None:
                    staying.append(connection)
            while len(staying) > 60:
                staying.pop(0).close()

        fuzz()
        assert watched.worker.status("/health")[0] == 200
        for connection in staying:
            connection.close()
        print(f"\n{next(asked)} clients")
        watched.end()


@pytest.mark.parametrize("where", ["in the head", "in the body", "in reading"])
@pytest.mark.timeout(600)
def test_hundreds_of_clients_that_stall(cluster: Cluster, where: str) -> None:
    """More than there are descriptors, and they stay; others come in their place. Then they leave without a word."""
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000"
    paths = (b"/engine/x", b"/metrics", b"/health")
    with Watched(cluster) as watched:
        port = watched.worker.status_port
        for path in ("/health", "/metrics") * 5:
            watched.worker.status(path)
        watched.begin()
        staying: list[socket.socket] = []
        for number in range(max(600, 4 * EXAMPLES)):
            connection = connect(port, 4096 if where == "in reading" else None)
            message = {
                "in the head": head % paths[number % 3],
                "in the body": head % paths[number % 3] + b"\r\n\r\nhalf of it",
                "in reading": b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n",
            }[where]
            connection.sendall(message)
            staying.append(connection)
            if len(staying) > 600:
                staying.pop(0).close()
        assert watched.worker.status("/health")[0] == 200
        for connection in staying:
            connection.close()
        watched.end()


# --------------------------------------------------------------------------------------------------- control routes

ROUTES = ["sleep", "wake_up", "save", "start_profile", "fail", "load_lora", "unload_lora", "list_loras"]
DRAIN_ROUTES = ["control/drain", "control/resume", "control/drain_status"]
JSON_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30))
JSON_VALUES = st.recursive(
    JSON_LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5)
)
NAMES = st.sampled_from(["a", "b", "echo", "", "../a", "\0", "x" * 300]) | st.text(max_size=20)
PLACES = st.sampled_from(["{root}", "{root}/a", "{root}/../b", "{root}/link/a", "/etc", "file:///etc", "s3://a/b", "."])
BODIES = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "level": JSON_VALUES,
            "tags": JSON_VALUES,
            "path": PLACES | JSON_VALUES,
            "profile_prefix": NAMES | JSON_VALUES,
            "lora_name": NAMES | JSON_VALUES,
            "lora_path": PLACES | JSON_VALUES,
            "source": st.fixed_dictionaries({"uri": PLACES | JSON_VALUES}) | JSON_VALUES,
        },
    ).map(json.dumps),
    st.fixed_dictionaries(
        {},
        optional={
            "mode": st.sampled_from(["complete", "handoff", "abort", "ABORT", ""]) | JSON_VALUES,
            "budget": st.sampled_from([0, 1, 0.5, -1, 1e308, 2**70, True, "1"]) | JSON_VALUES,
            "grace_period": st.sampled_from([0, 0.01, 3600, -1, "0"]) | JSON_VALUES,
        },
    ).map(json.dumps),
    JSON_VALUES.map(json.dumps),
    st.sampled_from(
        ["[" * 60_000, '{"a":' * 12_000, "1" * 60_000, " " * 65_536, " " * 65_537, '{"level": 1e999}', "{"]
    ),
    st.text(max_size=50),
    st.just("{}"),
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=50)


@st.composite
def calls(draw: st.DrawFn) -> tuple[bool, str, bytes]:
    """Return whether a call may be carried out, its route, and what is sent."""
    unknown = ["x", "", "sleep/", "../live", "sleep%00", "control/", "control/drain/", "control/x", "y" * 8000]
    route = draw(st.sampled_from(ROUTES) | st.sampled_from(DRAIN_ROUTES) | st.sampled_from(unknown))
    methods = ["POST"] * 8 + ["GET", "PUT", "post", "OPTIONS", "DELETE"]
    types = ["application/json"] * 6 + ["application/json; charset=utf-8", "text/plain", "application/jsonp", ""]
    hosts = ["localhost", "127.0.0.1:1", "[::1]", "LOCALHOST:80"] * 2 + ["x.example", "", "localhost.x.example", "["]
    origins = [None] * 6 + ["http://{host}", "https://x.example", "null", ""]
    method, kind, host = (draw(st.sampled_from(values)) for values in (methods, types, hosts))
    origin = draw(st.sampled_from(origins))
    body = draw(BODIES)
    lines = [f"{method} /engine/{route} HTTP/1.1", f"host: {host}", f"content-type: {kind}"]
    if origin is not None:
        lines.append("origin: " + origin.format(host=host))
    lines += [f"content-length: {len(body)}", *draw(st.sampled_from([[], [], [], ["host: localhost"], ["expect: 1"]]))]
    allowed = (
        method == "POST"
        and kind.startswith("application/json")
        and kind != "application/jsonp"
        and host in hosts[:4]
        and origin in (None, "http://{host}")
        and lines[-1] != "host: localhost"
    )
    return allowed, route, "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def call(port: int, message: bytes) -> tuple[int, dict[str, object]]:
    """Send a message; return the status and the JSON object that come back."""
    with connect(port) as connection:
        with contextlib.suppress(OSError):  # it was refused in the middle of it
            connection.sendall(message)
        received = b""
        with contextlib.suppress(ConnectionResetError):  # what was sent and not read
            while part := connection.recv(65536):
                received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), received
    return int(head.split()[1]), json.loads(body)


@pytest.mark.timeout(1800)
def test_control_routes(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    below = str(root.resolve())
    roots = ("--control-write-root", below, "--control-load-root", below)
    with Watched(cluster, "--engine", "strict", *roots) as watched, Client(cluster) as client:
        port = watched.worker.status_port
        for name in ROUTES * 3:
            watched.worker.operate(name, {"lora_name": "a", "source": {"uri": below}})
        for name in DRAIN_ROUTES * 3:
            watched.worker.operate(name, {})
        watched.begin()
        statuses: dict[int, int] = {}
        drained: dict[str, int] = {}

        @FUZZ
        @given(st.lists(calls(), **AT_ONCE))
        def fuzz(all_calls: list[tuple[bool, str, bytes]]) -> None:
            for allowed, route, message in all_calls:
                status, answer = call(port, message.replace(b"{root}", below.encode()))
                statuses[status] = statuses.get(status, 0) + 1
                assert status in (200, 400, 403, 404, 405, 411, 413, 415), (message, answer)
                assert allowed or status != 200, (message, answer)
                if status == 200 and route == "save" and answer["status"] == "success":
                    assert Path(str(answer["path"])).is_relative_to(below), (message, answer)
                if status == 200 and route in DRAIN_ROUTES:
                    drained[str(answer.get("phase"))] = drained.get(str(answer.get("phase")), 0) + 1

        fuzz()
        assert statuses[200], statuses
        assert drained, "no drain or resume was carried out"
        watched.worker.operate("wake_up")
        assert watched.worker.operate("control/resume", {})["phase"] == "serving"
        for adapter in watched.worker.operate("list_loras")["loras"]:
            watched.worker.operate("unload_lora", {"lora_name": adapter})
        check_serving(client)
        print(f"\n{sum(statuses.values())} calls: {statuses}; drains: {drained}")
        watched.end()
