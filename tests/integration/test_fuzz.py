"""Whatever arrives at a worker's endpoint and at its status server: it serves on, and keeps its memory and files."""

from __future__ import annotations

import array
import contextlib
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_worker.testing import Cluster, eventually

from . import fuzz_client

#: How much memory and how many descriptors may be more than at the beginning. The runtime takes 60 MiB once, after some
#: hundred errors, and no more in the next ten thousand (measured on 1.6.1).
MORE_MEMORY, MORE_DESCRIPTORS = 96 << 20, 4
#: What ``/live`` may take in seconds, in most cases and always: the machine has other work.
LIVE_USUALLY, LIVE_ALWAYS = 0.05, 2.0

FUZZ = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    max_examples=int(os.environ.get("DYNAMO_WORKER_TEST_EXAMPLES", "150")),
)


class Watched:
    """A worker whose use of memory and descriptors is watched."""

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        self.worker = cluster.worker("--grace-period", "0", *arguments)
        self.pid = self.worker.worker_pid
        self.live: list[float] = []
        self._before: tuple[int, int] | None = None

    def measure(self) -> tuple[int, int]:
        """Return the bytes and the descriptors that it uses."""
        match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        assert match
        return int(match[1]) << 10, len(os.listdir(f"/proc/{self.pid}/fd"))

    def begin(self) -> None:
        """Take the use until now for the usual one."""
        self._before = self.measure()

    def check_live(self) -> None:
        """Ask whether it lives."""
        began = time.monotonic()
        assert self.worker.status("/live")[0] == 200, self.worker.log[-3000:]
        self.live.append(time.monotonic() - began)

    def end(self) -> None:
        """Check that the worker is as it was, and stop it."""
        assert self._before is not None
        memory, descriptors = self._before
        eventually(
            lambda: self.measure()[1] <= descriptors + MORE_DESCRIPTORS, 15, f"{descriptors} descriptors, as before"
        )
        eventually(lambda: self.worker.metric("dynamo_worker_in_flight") == 0, 10, "nothing to be in flight")
        now = self.measure()[0]
        print(f"/live: median {statistics.median(self.live):.4f} s, longest {max(self.live):.4f} s")
        print(f"memory: {memory >> 20} MiB, then {now >> 20} MiB")
        assert now <= memory + MORE_MEMORY
        assert statistics.median(self.live) <= LIVE_USUALLY
        assert max(self.live) <= LIVE_ALWAYS
        assert "Traceback" not in self.worker.log, self.worker.log[-5000:]
        assert "panicked" not in self.worker.log, self.worker.log[-5000:]
        self.worker.stop()


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


class Client:
    """The other end of ``fuzz_client.py``."""

    def __init__(self, cluster: Cluster) -> None:
        self._process = subprocess.Popen(
            [sys.executable, fuzz_client.__file__],
            env=cluster.environment(DYN_LOG="off"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, *requests: object) -> list[tuple[str, object]]:
        """Make requests, all at once, and return how they ended."""
        fuzz_client.write(self._process.stdin, requests)
        answers: list[tuple[str, object]] = fuzz_client.read(self._process.stdout)
        return answers

    def close(self) -> None:
        with self._process:
            self._process.kill()


def check_answer(answer: tuple[str, object]) -> None:
    """Check that a request ended as requests do: with a finish reason, or a typed error."""
    kind, what = answer
    assert kind in ("ended", "stopped", "error"), answer
    if kind == "ended":
        assert isinstance(what, dict), answer
        assert what.get("finish_reason"), answer


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arguments", [(), ("--process-tree",)], ids=["in process", "process tree"])
def test_requests(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    watched = Watched(cluster, *arguments)
    client = Client(cluster)
    try:
        for extreme in EXTREMES:
            check_answer(client.ask(extreme)[0])
            watched.check_live()
        watched.begin()

        @FUZZ
        @given(st.lists(REQUESTS, min_size=1, max_size=8))
        def fuzz(requests: list[object]) -> None:
            for answer in client.ask(*requests):
                check_answer(answer)
            watched.check_live()

        fuzz()
        for extreme in EXTREMES:
            check_answer(client.ask(extreme)[0])
        how, last = client.ask(VALID)[0]
        # What waits together leaves together: the last chunk may hold all three tokens.
        assert (how, last["token_ids"][-1], last["finish_reason"]) == ("ended", 70, "length")
    finally:
        client.close()
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


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 5)


def speak(port: int, message: bytes, pieces: int, leaving: str) -> socket.socket | None:
    """Send a message in so many pieces and leave in one of these ways; return a connection that stays."""
    connection = connect(port)
    connection.settimeout(5)
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
    watched = Watched(cluster)
    port = watched.worker.status_port
    for path in ("/health", "/metrics", "/engine/x") * 5:
        watched.worker.status(path)
    watched.begin()
    staying: list[socket.socket] = []

    @FUZZ
    @given(st.lists(st.tuples(messages(), st.integers(1, 5), LEAVING), min_size=1, max_size=5))
    def fuzz(clients: list[tuple[bytes, int, str]]) -> None:
        for message, pieces, leaving in clients:
            connection = speak(port, message, pieces, leaving)
            if connection is not None:
                staying.append(connection)
        while len(staying) > 60:
            staying.pop(0).close()
        watched.check_live()

    fuzz()
    assert watched.worker.status("/health")[0] == 200
    for connection in staying:
        connection.close()
    watched.end()


def test_hundreds_of_clients_that_stall_in_the_middle_of_a_body(cluster: Cluster) -> None:
    """More than there are descriptors, and they stay; then they leave without a word."""
    watched = Watched(cluster)
    port = watched.worker.status_port
    for path in ("/health", "/metrics") * 5:
        watched.worker.status(path)
    watched.begin()
    staying = []
    for number in range(600):
        connection = connect(port)
        path = ("/engine/x", "/metrics", "/health")[number % 3]
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000"
        connection.sendall(f"{head}\r\n\r\nhalf of it".encode())
        staying.append(connection)
        if number % 20 == 0:
            watched.check_live()
    assert watched.worker.status("/health")[0] == 200
    for connection in staying:
        connection.close()
    watched.end()
