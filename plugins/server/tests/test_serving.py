"""Whole workers with the fake server, behind a real frontend."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dynamo_worker_server
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


def test_a_life_behind_a_frontend(cluster: Cluster, tmp_path: Path) -> None:
    """Both of two workers serve, by all names; errors reach the client; a drain waits; nothing is left.

    The plugin of one is installed elsewhere, as on another machine or in another release.
    """
    names = ("--served-model-name", "mine,too")
    shutil.copytree(Path(dynamo_worker_server.__file__).parent, tmp_path / "elsewhere" / "dynamo_worker_server")
    cluster.start_frontend()
    first = cluster.worker(*names)
    second = cluster.worker(*names, PYTHONPATH=str(tmp_path / "elsewhere"))
    cluster.wait_model()
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
    load = Load(cluster.url, [chat(name, "one two", 300) for name in ("mine", "too") * 2])
    eventually(load.started, 30, "the streams")
    first.signal(signal.SIGTERM)
    assert first.wait_gone() == 0
    assert all(result.ok for result in load.wait()), load.summary()
    assert all(len(result.text.split()) == 300 for result in load.results)
    # In the place of a server its own frontend would send it each request again, and again.
    cluster.engine_args = ["--engine", "server", "--attach", cluster.url]
    circular = cluster.start_worker()
    assert circular.wait_gone() == 3
    assert f"{cluster.url} is a frontend of Dynamo" in circular.log


def test_generation_stands_still_while_health_is_fine(cluster: Cluster) -> None:
    (worker,) = cluster.serve(1, "--served-model-name", "mine", "--stall-timeout", "2")
    stuck = Load(cluster.url, [chat("mine", "fail:stuck", 5)])
    assert worker.wait_gone() == 1
    assert "Fatal error kind=EngineStalledError" in worker.log
    assert not stuck.wait()[0].ok


def stats(port: int) -> dict[str, int]:
    """Return what the fake server has been asked."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as answer:
        return json.load(answer)


def test_a_server_elsewhere_dies(cluster: Cluster) -> None:
    """Each of its models answers what is asked of it. The key is in no log; the worker exits soon after the server."""
    port = choose_port(None)
    flags = ("--models", "mine,other/2,Other:2", "--key", "sk-secret")
    server = subprocess.Popen([sys.executable, FAKE, "--port", str(port), *flags])
    try:
        cluster.engine_args = ["--engine", "server", "--attach", f"http://127.0.0.1:{port}", "--grace-period", "0"]
        cluster.start_frontend()
        flags = ("--server-token-env", "SERVER_KEY", "--health-check-interval", "0.2", "--log-level", "debug")
        worker = cluster.worker(*flags, SERVER_KEY="sk-secret")
        cluster.wait_model()
        assert cluster.ask(1, "a").text == "a "
        before = stats(port)
        for _ in range(2):
            eventually(lambda: "other/2" in cluster.models(), 10, "the other model")
            assert Load(cluster.url, [chat("other/2", "a", 1)]).wait()[0].ok
            # Out of discovery and back, with all of its models.
            worker.operate("control/drain", {"grace_period": 0})
            eventually(lambda: not cluster.models(), 10, "the models to go")
            worker.operate("control/resume")
        after = stats(port)
        asked = {name: after[name] - before.get(name, 0) for name in ("model mine", "model other/2")}
        assert asked["model other/2"] == 2, asked
        assert "takes its name for that of another one model=Other:2" in worker.log
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
