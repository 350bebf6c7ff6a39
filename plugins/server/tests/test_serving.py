"""Whole workers with the fake server, behind a real frontend."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import pytest

from conftest import FAKE, fake
from dynamo_worker.testing import Load, Subject, eventually
from dynamo_worker.testing.client import chat
from dynamo_worker_server.server_process import choose_port

if TYPE_CHECKING:
    from dynamo_worker.testing import Cluster


@pytest.fixture
def subject() -> Subject:
    command = shlex.join(fake("--pause", "0.01"))
    return Subject("server", ["--server-command", command, "--grace-period", "0"], model="mine")


def test_a_life_behind_a_frontend(cluster: Cluster) -> None:
    """Both of two workers serve, by all names; errors reach the client; a drain waits; nothing is left."""
    names = ("--served-model-name", "mine,too")
    first, second = cluster.serve(2, *names)
    for worker in (first, second):
        cluster.wait_routed(worker)
        assert "different card" not in worker.log
    with urllib.request.urlopen(f"{cluster.url}/v1/models") as answer:
        assert {model["id"] for model in json.load(answer)["data"]} == {"mine", "too"}
    assert cluster.ask(4, "one two").text == "one two one two "
    status, answer = cluster.chat("one two", max_tokens=3)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "one two one ")
    status, answer = cluster.complete("a b", max_tokens=3)
    assert (status, answer["choices"][0]["text"]) == (200, "a b a ")
    assert cluster.chat("fail:status-400")[0] == 400
    assert cluster.chat("fail:status-500")[0] == 500
    torn = cluster.ask(6, "a fail:garbage")
    assert torn.text == "a fail:garbage a "
    assert not torn.ok
    assert torn.error is not None
    second.stop()
    load = cluster.load(4, 300)
    first.signal(signal.SIGTERM)
    assert first.wait_gone() == 0
    assert all(result.ok for result in load.wait()), load.summary()
    assert all(len(result.text.split()) == 300 for result in load.results)


def test_generation_stands_still_while_health_is_fine(cluster: Cluster) -> None:
    (worker,) = cluster.serve(1, "--served-model-name", "mine", "--stall-timeout", "2")
    stuck = Load(cluster.url, [chat("mine", "fail:stuck", 5)])
    assert worker.wait_gone() == 1
    assert "Fatal error kind=EngineStalledError" in worker.log
    assert not stuck.wait()[0].ok


def test_a_server_elsewhere_dies(cluster: Cluster) -> None:
    """The worker is told a key that is in none of its lines, and exits soon after the server."""
    port = choose_port(None)
    server = subprocess.Popen([sys.executable, FAKE, "--port", str(port), "--models", "mine", "--key", "sk-secret"])
    try:
        cluster.engine_args = ["--engine", "server", "--attach", f"http://127.0.0.1:{port}", "--grace-period", "0"]
        cluster.start_frontend()
        flags = ("--server-token-env", "SERVER_KEY", "--health-check-interval", "0.2", "--log-level", "debug")
        worker = cluster.worker(*flags, SERVER_KEY="sk-secret")
        cluster.wait_model()
        assert cluster.ask(1, "a").text == "a "
        server.kill()
        server.wait()
        assert worker.wait_gone() == 1
        assert re.search(r"Fatal error kind=EngineDeadError .*does not answer /health.*3 times in a row", worker.log)
        assert "sk-secret" not in worker.log
    finally:
        server.kill()
        server.wait()


def test_a_command_that_cannot_run(cluster: Cluster) -> None:
    cluster.engine_args = ["--engine", "server", "--", "/nowhere/server", "--namespace", "x", "{port}"]
    worker = cluster.start_worker()
    assert worker.wait_gone() == 3
    assert "cannot run '/nowhere/server': No such file or directory" in worker.log
    eventually(lambda: not worker.registered, 5)
