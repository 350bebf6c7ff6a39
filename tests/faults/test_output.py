"""Who reads the log, or does not, changes nothing for requests, for the stop and for the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_worker.supervisor.output import write_now
from dynamo_worker.testing import Cluster, eventually

from .conftest import PLUGINS, FaultyCluster

#: What a worker under test is started with; refused requests are logged.
COMMAND = [sys.executable, "-m", "dynamo_worker", "--engine", "faulty", "--grace-period", "0", "--no-warmup"]


class Piped:
    """A worker whose stderr, or both outputs, are a pipe that we read when we want to."""

    def __init__(self, cluster: Cluster, *arguments: str, **environment: str) -> None:
        self.reading, self.writing = os.pipe()
        self.text = b""
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=cluster.environment(PYTHONPATH=str(PLUGINS), PYTHONUNBUFFERED=None, **environment),
            stdin=subprocess.DEVNULL,
            stdout=self.writing,
            stderr=self.writing,
            start_new_session=True,
        )
        self.read_until(rb"Worker ready")
        cluster.wait_model()

    def read_until(self, pattern: bytes, timeout: float = 60.0) -> re.Match[bytes]:
        os.set_blocking(self.reading, False)

        def found() -> re.Match[bytes] | None:
            with contextlib.suppress(BlockingIOError):
                while piece := os.read(self.reading, 1 << 16):
                    self.text += piece
            return re.search(pattern, self.text)

        match = eventually(found, timeout, f"{pattern!r} on stderr: {self.text[-3000:]!r}")
        assert match is not None
        return match

    def fill(self) -> None:
        """Fill the pipe, as a reader does that hangs while everybody goes on writing."""
        with contextlib.suppress(BlockingIOError):
            while True:
                write_now(self.writing, b"\n" * 4096)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.reading, self.writing):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def serving(cluster: Cluster) -> Iterator[list[Piped]]:
    cluster.start_frontend()
    started: list[Piped] = []
    yield started
    for worker in started:
        worker.close()


@pytest.mark.parametrize("supervised", [True, False])
def test_a_log_that_nobody_reads(cluster: Cluster, serving: list[Piped], supervised: bool) -> None:
    """Refused requests are logged, with long texts; the supervisor would kill a worker whose loop waits for that."""
    # Without a supervisor what the Dynamo runtime prints may wait, but our own lines do not.
    if supervised:
        worker = Piped(cluster, "--heartbeat-timeout", "3", "--log-level", "debug")
    else:
        worker = Piped(cluster, "--no-supervise", DYN_LOG="off")
    serving.append(worker)
    worker.fill()
    since = time.monotonic()
    refused = 0
    while time.monotonic() - since < 4:
        assert not cluster.ask(3, "bad").ok
        refused += 1
    result = cluster.ask(3, "good")
    assert result.ok, result
    load = cluster.load(2, 20)
    worker.process.send_signal(signal.SIGTERM)
    entries = cluster.discovery / "v1" / "instances"
    eventually(lambda: not list(entries.iterdir()), 5, "out of discovery, though nobody reads")
    assert all(result.ok for result in load.wait())
    assert worker.process.wait(20) == 0


def test_lines_that_waited_come_out_when_somebody_reads_again(cluster: Cluster, serving: list[Piped]) -> None:
    worker = Piped(cluster)
    serving.append(worker)
    worker.fill()
    assert not cluster.ask(3, "bad").ok
    os.kill(worker.process.pid, signal.SIGUSR1)
    worker.read_until(rb"Request refused")
    worker.read_until(rb"Current thread|Thread 0x")
    assert worker.stop() == 0
    worker.read_until(rb"Worker stopped code=0")
    assert worker.text.index(b"Worker process ends") < worker.text.index(b"Worker stopped")


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("what", ["reader gone", "disk full", "closed"])
def test_the_exit_code_of_a_clean_stop(cluster: Cluster, serving: list[Piped], what: str, supervised: bool) -> None:
    """The engine has printed something that is only written out at the end."""
    mode = [] if supervised else ["--no-supervise"]
    if what == "reader gone":
        worker = Piped(cluster, *mode)
        serving.append(worker)
        os.close(worker.reading)
        assert not cluster.ask(3, "bad").ok
        assert cluster.ask(3, "print").ok
        assert worker.stop() == 0
        return
    command = [*COMMAND, *mode]
    environment = cluster.environment(PYTHONPATH=str(PLUGINS), PYTHONUNBUFFERED=None)
    if what == "closed":
        command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=full, stderr=full)
    try:
        cluster.wait_model(30)
        assert cluster.ask(3, "print").ok
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("place", ["pipe", "file"])
def test_everything_printed_is_json(cluster: Cluster, faulty: FaultyCluster, serving: list[Piped], place: str) -> None:
    """The worker's log and the runtime's; what the engine prints, and its child; a traceback is one event."""
    flags = ["--log-format", "json"]
    if place == "file":
        cluster.start_frontend()
        worker = faulty.start(*flags, DYN_LOG="info")
        cluster.wait_model()
    else:
        serving.append(Piped(cluster, *flags, DYN_LOG="info"))
    statuses = [cluster.complete(prompt)[0] for prompt in ("write", "bad", "bug")]
    assert statuses == [200, 400, 500]
    if place == "file":
        worker.stop()
        text = worker.log
    else:
        assert serving[0].stop() == 0
        serving[0].read_until(rb"Worker stopped")
        text = serving[0].text.decode()
    assert "\x1b" not in text
    events = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(event, dict) for event in events)
    printed = {event["level"]: event["message"] for event in events if event.get("logger") == "output"}
    assert printed["WARNING"] == "WARNING 50 % of the memory is free"
    assert re.search(r"(?s)^Traceback .*\nSystemError: in a child$", printed["ERROR"])
    assert any(event.get("target", "").startswith("dynamo_") for event in events), "lines of the runtime"
    requests = [event for event in events if event["message"] in ("Request refused", "Request failed")]
    assert len({event["trace_id"] for event in requests}) == 2  # the runtime gives every request one


def test_text_without_a_terminal_has_no_colours(cluster: Cluster, serving: list[Piped]) -> None:
    worker = Piped(cluster, DYN_LOG="info")
    serving.append(worker)
    assert cluster.complete("write")[0] == 200
    assert worker.stop() == 0
    worker.read_until(rb"Worker stopped")
    assert b"WARNING 50 % of the memory" in worker.text
    assert b" INFO dynamo_runtime" in worker.text
    assert b"\x1b" not in worker.text


def test_a_frontends_log_is_json(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_frontend("--log-format", "json", DYN_LOG="info")
    cluster.worker()
    cluster.wait_model()
    assert cluster.complete()[0] == 200
    (log,) = tmp_path.rglob("frontend-*.log")

    def events() -> list[dict[str, object]]:
        return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    eventually(lambda: any("request" in str(event) for event in events()), 5, "lines about the request")
    assert all("level" in event and "message" in event for event in events())
