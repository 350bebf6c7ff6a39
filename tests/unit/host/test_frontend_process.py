"""The frontend process beside a worker: its command line, its start and its end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_worker.address import Address
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import StartError
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.frontend import frontend_process
from dynamo_worker.host.frontend import main as frontend
from dynamo_worker.host.frontend.frontend_process import FrontendProcess
from dynamo_worker.supervisor import ledger
from dynamo_worker.supervisor.interpreter import module_command


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Address("127.0.0.1", server.getsockname()[1])


def process(program, address=None):
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return child, FrontendProcess(child, address or free_address())


def test_an_address_in_use_says_so():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(StartError, match=f"{address.port} is in use") as raised:
            frontend_process.check_free(address)
        assert "--frontend" in raised.value.hint


def test_an_address_that_is_not_ours_says_so():
    with pytest.raises(StartError, match=r"192\.0\.2\.1:8000 cannot be used: "):
        frontend_process.check_free(Address("192.0.2.1", 8000))


def test_a_free_address_stays_free():
    address = free_address()
    frontend_process.check_free(address)
    with socket.create_server(address):
        pass


def test_urls_can_be_opened():
    child, started = process("", Address("::1", 8000))
    child.communicate()
    assert started.url == "http://[::1]:8000"


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Let a script stand in for the interpreter; return what it was called with."""
    called = tmp_path / "called"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {called}.new\nmv {called}.new {called}\nexec sleep 60\n')
    script.chmod(0o755)

    def start(settings, discovery_path):
        monkeypatch.setattr(sys, "executable", str(script))
        started = FrontendProcess.start(settings, discovery_path, tmp_path)
        try:
            recorded, seconds = ledger.frontend(tmp_path)
            assert (recorded.pid, seconds) == (started.pid, 30.0)
            assert os.getsid(started.pid) == started.pid, "a Ctrl-C meant for the worker would end it"
            deadline = time.monotonic() + 10
            while not called.exists():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            return called.read_text().split("\0")[:-1]
        finally:
            asyncio.run(started.stop(Deadline.after(0.2)))

    return start


def test_it_is_started_with_the_workers_settings(arguments, tmp_path):
    address = free_address()
    settings = WorkerSettings(
        engine="echo",
        frontend=address,
        discovery_backend="file",
        request_plane="tcp",
        event_plane="zmq",
        migration_limit=7,
        router_mode="kv",
        discovery_outage=45,
    )
    called = arguments(settings, tmp_path / "kv")
    command = [*module_command("dynamo_worker"), "frontend"][1:]
    assert called[: len(command)] == command
    args = frontend.parser().parse_args(called[len(command) :])
    assert vars(args) == {
        "http": str(address),
        "discovery_timeout": 30.0,
        "discovery_outage": 45.0,
        "discovery_backend": "file",
        "discovery_path": str(tmp_path / "kv"),
        "request_plane": "tcp",
        "event_plane": "zmq",
        "migration_limit": 7,
        "router_mode": "kv",
        "log_level": "info",
        "log_format": "text",
    }


def test_an_address_in_use_is_found_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = WorkerSettings(engine="echo", frontend=f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(StartError, match="in use"):
            FrontendProcess.start(settings, None, tmp_path)


SERVER = """
import http.server, json, os, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = ["other"] + ["model"] * os.path.exists({offered!r})
        self.send_response(200)
        self.end_headers()
        models = {{"data": [{{"id": name}} for name in names]}}
        answer = models if time.monotonic() > begin + 0.5 else {{"message": "not yet"}}
        self.wfile.write(json.dumps(answer).encode())
    def log_message(self, *_): pass
begin = time.monotonic()
time.sleep(0.1)
http.server.HTTPServer({address!r}, Handler).serve_forever()
"""


def test_it_is_ready_once_it_offers_the_model(tmp_path):
    address, offered = free_address(), tmp_path / "offered"
    child, started = process(SERVER.format(address=tuple(address), offered=str(offered)), address)

    async def scenario():
        await started.wait_ready()
        await started.check()
        ready = asyncio.ensure_future(started.wait_ready("model"))
        await asyncio.sleep(0.1)
        assert not ready.done()
        offered.touch()
        await asyncio.wait_for(ready, 10)

    with child:
        try:
            asyncio.run(scenario())
        finally:
            child.kill()


def test_one_that_never_offers_the_model_is_a_failed_start(monkeypatch, tmp_path):
    monkeypatch.setattr(frontend_process, "_START_SECONDS", 1.0)
    address = free_address()
    child, started = process(SERVER.format(address=tuple(address), offered="/none"), address)
    with child:
        try:
            with pytest.raises(StartError, match="does not offer 'model' after 1 s"):
                asyncio.run(started.wait_ready("model"))
        finally:
            child.kill()


def test_a_frontend_that_ends_at_once_is_a_failed_start():
    child, started = process("raise SystemExit(4)")
    with child, pytest.raises(StartError, match="exit code 4"):
        asyncio.run(started.wait_ready())


def test_a_frontend_that_never_listens_is_a_failed_start(monkeypatch):
    monkeypatch.setattr(frontend_process, "_START_SECONDS", 0.1)
    child, started = process("import time; time.sleep(60)")
    with child:
        try:
            with pytest.raises(StartError, match="is not listening"):
                asyncio.run(started.wait_ready())
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import time; print('up', flush=True); time.sleep(60)", -15),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)", -9),
        ("import os, signal; print('up', flush=True); os.kill(os.getpid(), signal.SIGSTOP)", -15),
    ],
    ids=["obedient", "stubborn", "stopped"],
)
def test_it_is_gone_after_stop_whatever_it_does(program, code):
    child, started = process(program)
    with child:
        assert child.stdout.readline() == b"up\n"
        if "SIGSTOP" in program:
            state = Path(f"/proc/{child.pid}/stat")
            deadline = time.monotonic() + 10
            while state.read_text().rpartition(")")[2].split()[0] != "T":
                assert time.monotonic() < deadline
                time.sleep(0.005)
        begin = time.monotonic()
        asyncio.run(started.stop(Deadline.after(0.2)))
        assert time.monotonic() - begin < 3
        assert child.returncode == code
        assert not Path(f"/proc/{child.pid}").exists(), "reaped"


def test_stopping_one_that_is_gone_is_no_error():
    child, started = process("pass")
    with child:
        child.wait()
        asyncio.run(started.stop(Deadline.after(0.2)))
        asyncio.run(started.stop(Deadline.after(0.2)))
