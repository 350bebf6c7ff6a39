"""The frontend beside a worker: its address, its command line, its start and its end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynamo_worker.address import Address, resolve
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host import frontend
from dynamo_worker.host.frontend import FrontendProcess, parse_address
from dynamo_worker.host.settings import WorkerSettings
from dynamo_worker.supervisor import ledger, linux
from dynamo_worker.supervisor.interpreter import module_command


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Address("127.0.0.1", server.getsockname()[1])


def process(program, address=None):
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return child, FrontendProcess(child, address or free_address())


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("frontend.svc:65535", ("frontend.svc", 65535)),
        (":9000", ("127.0.0.1", 9000)),
        ("9000", ("127.0.0.1", 9000)),
        ("localhost", ("localhost", 8000)),
        ("[::1]:9000", ("::1", 9000)),
        ("[::]", ("::", 8000)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["host:", "host:0", "host:65536", "host:http", "a b:1", "http://host:1", "::1:80"])
def test_what_is_no_address_says_how_one_looks(text):
    with pytest.raises(UsageError, match="HOST:PORT") as raised:
        parse_address(text)
    assert repr(text) in str(raised.value)


@given(st.text(max_size=30) | st.from_regex("[a-z0-9.:\\[\\]-]{0,12}:[0-9\u0660-\u0669\u00b2]{0,7}", fullmatch=True))
@example("1" * 5000)
@example("host:" + "1" * 5000)
@example("host:²")
@example("host:٣")
def test_any_text_is_an_address_or_refused(text):
    try:
        address = parse_address(text)
    except UsageError:
        return
    assert 0 < address.port < 65536
    assert address.host
    assert parse_address(str(address)) == address, "what is printed can be typed"


def test_an_address_in_use_says_so():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(StartError, match=f"{address.port} is in use") as raised:
            frontend._check_free(address)
        assert "--frontend" in raised.value.hint


def test_an_address_that_is_not_ours_says_so():
    with pytest.raises(StartError, match=r"192\.0\.2\.1:8000 cannot be used: "):
        frontend._check_free(Address("192.0.2.1", 8000))


def test_a_free_address_stays_free():
    address = free_address()
    frontend._check_free(address)
    with socket.create_server(address):
        pass


def test_urls_can_be_opened():
    child, started = process("", Address("::1", 8000))
    child.communicate()
    assert started.url == "http://[::1]:8000"


def test_host_names_become_addresses_because_the_runtime_takes_nothing_else():
    assert Address("localhost", 8000).resolved("--http") == ("127.0.0.1", 8000)
    assert Address("::1", 8000).resolved("--http") == ("::1", 8000)
    assert Address("0.0.0.0", 8000).resolved("--http") == ("0.0.0.0", 8000)


def test_ipv4_comes_first_where_a_name_has_both(monkeypatch):
    both = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert resolve("both", "--http both") == "127.0.0.1"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a..b", "x" * 300])
def test_a_name_that_does_not_resolve_is_a_mistake_of_the_usage(host):
    with pytest.raises(UsageError, match="cannot resolve host") as raised:
        Address(host, 8000).resolved("--http")
    assert f"--http {host}:8000: cannot resolve host {host!r}" in str(raised.value)


# ------------------------------------------------------------------------------------------------------ command line


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
    )
    called = arguments(settings, tmp_path / "kv")
    command = [*module_command("dynamo_worker"), "frontend"][1:]
    assert called[: len(command)] == command
    args = frontend.parser().parse_args(called[len(command) :])
    assert vars(args) == {
        "http": str(address),
        "discovery_backend": "file",
        "discovery_path": str(tmp_path / "kv"),
        "request_plane": "tcp",
        "event_plane": "zmq",
        "migration_limit": 7,
        "router_mode": "kv",
        "log_level": "info",
        "log_format": "text",
    }


def test_every_router_mode_exists_in_dynamo():
    from dynamo.llm import RouterMode

    assert all(hasattr(RouterMode, name) for name in frontend.ROUTER_MODES.values())


def test_dynamos_variables_are_the_defaults(monkeypatch):
    monkeypatch.setenv("DYN_MIGRATION_LIMIT", "5")
    monkeypatch.setenv("DYN_ROUTER_MODE", "random")
    args = frontend.parser().parse_args([])
    assert (args.migration_limit, args.router_mode) == (5, "random")
    assert frontend.parser().parse_args(["--migration-limit", "0"]).migration_limit == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DYN_MIGRATION_LIMIT", "many"),
        ("DYN_MIGRATION_LIMIT", "-1"),
        ("DYN_MIGRATION_LIMIT", "4294967296"),
        ("DYN_MIGRATION_LIMIT", "1" * 5000),
        ("DYN_WORKER_LOG_LEVEL", "trace"),
        ("DYN_WORKER_LOG_FORMAT", "xml"),
        ("DYN_ROUTER_MODE", "best"),
        ("DYN_DISCOVERY_BACKEND", "zookeeper"),
    ],
)
def test_a_wrong_variable_is_a_mistake_of_the_usage(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as raised:
        frontend.parser().parse_args([])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert f"(from {variable})" in error
    assert value in error


@pytest.mark.parametrize("text", ["abc", "-1", "nan", "inf", "1e8"])
def test_a_wrong_limit_for_the_end_is_a_mistake_of_the_usage(monkeypatch, text):
    monkeypatch.setenv("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", text)
    with pytest.raises(UsageError, match=f"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS={text}"):
        frontend._drain_seconds()


def test_an_empty_variable_counts_as_unset(monkeypatch):
    for name in ("DYN_EVENT_PLANE", "DYN_MIGRATION_LIMIT", "DYN_WORKER_LOG_LEVEL", "DYN_DISCOVERY_BACKEND"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "")
    args = frontend.parser().parse_args([])
    assert (args.event_plane, args.migration_limit, args.log_level) == (None, 3, "info")
    assert args.discovery_backend == "file"
    assert frontend._drain_seconds() == 5


def test_case_does_not_matter_as_for_the_worker(monkeypatch):
    monkeypatch.setenv("DYN_WORKER_LOG_LEVEL", "INFO")
    assert frontend.parser().parse_args([]).log_level == "info"


def test_an_address_in_use_is_found_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = WorkerSettings(engine="echo", frontend=f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(StartError, match="in use"):
            FrontendProcess.start(settings, None, None)


# ----------------------------------------------------------------------------------------------------- start and end


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
    monkeypatch.setattr(frontend, "_START_SECONDS", 1.0)
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
    monkeypatch.setattr(frontend, "_START_SECONDS", 0.1)
    child, started = process("import time; time.sleep(60)")
    with child:
        try:
            with pytest.raises(StartError, match="does not listen"):
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


def test_one_whose_worker_is_gone_already_does_not_begin(monkeypatch):
    monkeypatch.setenv("DYNAMO_WORKER_FRONTEND_OF", str(os.getpid()))  # not the parent of this very process
    monkeypatch.setattr(linux, "on_parent_death", lambda number, parent: parent != os.getpid())
    assert frontend.main(["--http", "nonsense:nonsense"]) == 0
