"""Spans reach the collector although the worker ends, and no collector keeps it from ending."""

from __future__ import annotations

import http.server
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from dynamo_worker.testing import Cluster, eventually

from .conftest import FaultyCluster

#: Trace ids of the requests, in hexadecimal.
TRACES = [f"4bf92f3577b34da6a3ce929d0e0e473{digit}" for digit in range(5)]
#: The span of a request in a worker.
SPAN = b"handle_payload"


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        self.batches: list[bytes] = []
        batches = self.batches

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                batches.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.server_address[1])

    def traces_with(self, span: bytes) -> set[str]:
        """Return the ids of our traces of which a span with this name has arrived."""
        data = b"".join(batch for batch in self.batches if span in batch)
        return {trace for trace in TRACES if bytes.fromhex(trace) in data}


def environment(port: int) -> dict[str, str]:
    return {
        "OTEL_EXPORT_ENABLED": "1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces",
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def send(cluster: Cluster, trace: str, prompt: str = "Hello!") -> int:
    """Send a request that belongs to a trace; return the HTTP status of the answer."""
    request = urllib.request.Request(
        f"{cluster.url}/v1/completions",
        json.dumps({"model": cluster.model, "prompt": prompt, "max_tokens": 3}).encode(),
        {"Content-Type": "application/json", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_last_spans_of_a_worker(cluster: Cluster, faulty: FaultyCluster, collector: Collector) -> None:
    """Without a grace period it ends in milliseconds; the exporter sends a batch every 5 s unless told otherwise."""
    cluster.start_frontend(OTEL_EXPORT_ENABLED="1", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://127.0.0.1:9")
    worker = faulty.serving(**collector.environment)
    statuses = [send(cluster, trace, prompt) for trace, prompt in zip(TRACES, ["bad", *["Hello!"] * 4], strict=True)]
    assert statuses == [400, *[200] * 4]
    since = worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    print(f"gone after {time.monotonic() - since:.3f} s")
    assert collector.traces_with(SPAN) == set(TRACES)
    assert f"trace_id={TRACES[0]}" in worker.log


def test_the_last_spans_of_a_fatal_error(cluster: Cluster, faulty: FaultyCluster, collector: Collector) -> None:
    cluster.start_frontend(OTEL_EXPORT_ENABLED="1", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://127.0.0.1:9")
    worker = faulty.serving(**collector.environment)
    assert send(cluster, TRACES[0], "dead") >= 500
    assert worker.wait_gone() == 1
    assert collector.traces_with(SPAN) == {TRACES[0]}


@pytest.mark.parametrize("silent", [True, False])
def test_no_collector(cluster: Cluster, faulty: FaultyCluster, silent: bool) -> None:
    """It accepts connections and says nothing, or is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        worker = faulty.serving(**environment(port))
        assert send(cluster, TRACES[0]) == 200
        since = worker.signal(signal.SIGTERM)
        assert worker.wait_gone() == 0
        assert time.monotonic() - since < 5


def test_the_last_spans_of_a_frontend(cluster: Cluster, faulty: FaultyCluster, collector: Collector) -> None:
    cluster.start_frontend(**collector.environment)
    faulty.serving()
    assert send(cluster, TRACES[0]) == 200
    frontend = cluster._processes[0]
    frontend.send_signal(signal.SIGTERM)
    assert frontend.wait(20) == 0
    eventually(lambda: collector.traces_with(b"http-request") == {TRACES[0]}, 1, "the frontend's span")
