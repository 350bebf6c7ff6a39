"""`dynamo-worker drain` and `resume`: what they ask of a worker, show, and return."""

from __future__ import annotations

import http.server
import io
import json
import socket
import sys
import threading

import pytest

from dynamo_worker.cli import control_client, drain, main
from dynamo_worker.exit_codes import ExitCode

TOKEN = "DYN_WORKER_CONTROL_TOKEN"


class FakeWorker:
    """A status server that gives prepared answers, the last one again and again; ``calls`` is what it was asked."""

    def __init__(self):
        self.answers = []
        self.calls = []
        worker = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                worker.calls.append((self.path, json.loads(body), dict(self.headers.items())))
                status, answer = worker.answers.pop(0) if len(worker.answers) > 1 else worker.answers[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *_):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def say(self, *answers):
        self.answers = list(answers)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def report(phase, in_flight=0, left_s=20.0, **fields):
    """Return an answer with the progress of a drain."""
    progress = {} if phase in ("serving", "resuming") else {"mode": "complete", "left_s": left_s}
    known = {"in_discovery": phase == "serving", "engine_paused": False}
    return 200, {"status": "success", "phase": phase, "in_flight": in_flight, **known, **progress, **fields}


@pytest.fixture
def worker(monkeypatch):
    for name in (TOKEN, f"{TOKEN}_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(drain, "_POLL", 0.01)
    fake = FakeWorker()
    yield fake
    fake.close()


@pytest.fixture
def run(worker, capsys):
    """Return a function that runs a command on the worker; it returns the exit code, stdout and stderr."""

    def run(command, *arguments):
        code = main.main([command, f"127.0.0.1:{worker.port}", *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_drain_begins_and_the_command_returns(worker, run):
    worker.say(report("leaving", 3))
    code, out, err = run("drain")
    assert (code, err) == (0, "")
    assert out == (
        f"127.0.0.1:{worker.port}: draining: 3 requests in flight; 20 s until the rest is handed off. "
        f"`dynamo-worker drain 127.0.0.1:{worker.port} --wait` shows the progress\n"
    )
    ((path, body, headers),) = worker.calls
    assert (path, body) == ("/engine/control/drain", {})
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers


def test_flags_become_the_body(worker, run):
    worker.say(report("drained"))
    assert run("drain", "--mode", "handoff", "--budget=60", "--grace-period", "0")[0] == 0
    assert worker.calls[0][1] == {"mode": "handoff", "budget": 60, "grace_period": 0}


def test_waiting_ends_with_the_drain(worker, run):
    worker.say(report("leaving", 2), report("grace", 2), report("draining", 1), report("drained"))
    code, out, _ = run("drain", "--wait")
    assert code == 0
    assert "drained, the engine is warm. `dynamo-worker resume" in out
    assert [path for path, *_ in worker.calls] == ["/engine/control/drain"] + ["/engine/control/drain_status"] * 3


def test_waiting_shows_the_progress_line_on_a_terminal(worker, run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(drain, "_POLL", 0.3)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    worker.say(report("draining", 12), report("draining", 1, 7.0), report("draining", 1, 7.0), report("drained"))
    assert run("drain", "--wait")[0] == 0
    shown = terminal.getvalue()
    assert "12 requests left, 20 s until the rest is handed off." in shown
    assert "1 request left, 7 s until" in shown
    assert "Ctrl-C to stop watching; the drain goes on." in shown


def test_a_worker_that_is_drained_already_need_not_be_waited_for(worker, run):
    worker.say(report("drained"))
    assert run("drain", "--wait")[0] == 0
    assert len(worker.calls) == 1


def test_json(worker, run):
    worker.say(report("drained", extra=1))
    code, out, _ = run("drain", "--wait", "--json")
    assert code == 0
    assert json.loads(out) == report("drained", extra=1)[1]


def test_a_worker_that_is_still_in_discovery_is_a_warning(worker, run):
    worker.say(report("drained", in_discovery=True))
    code, _, err = run("drain", "--wait")
    assert code == 0
    assert "warning" in err
    assert "discovery has not let the worker go yet" in err


def test_a_worker_that_is_resumed_meanwhile_is_an_error(worker, run):
    worker.say(report("leaving", 2), report("serving", 2))
    code, _, err = run("drain", "--wait")
    assert code == ExitCode.FATAL
    assert "the worker was resumed before it was drained" in err


def test_requests_that_do_not_end_after_the_budget(worker, run, monkeypatch):
    monkeypatch.setattr(drain, "_OVERTIME", 0.05)
    worker.say(report("draining", 2, 0.0))
    code, _, err = run("drain", "--wait")
    assert code == ExitCode.DEADLINE
    assert "the budget is over, and 2 requests in flight have not ended" in err


def test_a_worker_that_ends_meanwhile_is_an_error(worker, run):
    worker.say(report("draining", 2), (200, {"status": "error", "message": "the worker is shutting down"}))
    code, _, err = run("drain", "--wait")
    assert code == ExitCode.FATAL
    assert "the worker refuses: the worker is shutting down" in err


def test_resume(worker, run):
    worker.say(report("serving", 1))
    code, out, err = run("resume")
    assert (code, err) == (0, "")
    assert out == f"127.0.0.1:{worker.port}: in service, 1 request in flight\n"
    assert worker.calls[0][:2] == ("/engine/control/resume", {})


def test_resume_of_a_paused_engine(worker, run):
    worker.say(report("serving", engine_paused=True))
    assert "the engine is paused and stays out of discovery until it is resumed" in run("resume")[1]


def test_the_token_comes_from_the_variable_or_a_file(worker, run, monkeypatch, tmp_path):
    worker.say(report("drained"))
    monkeypatch.setenv(TOKEN, "secret")
    assert run("drain")[0] == 0
    monkeypatch.delenv(TOKEN)
    file = tmp_path / "token"
    file.write_text("other\n")
    assert run("drain", "--control-token-file", str(file))[0] == 0
    monkeypatch.setenv(f"{TOKEN}_FILE", str(file))
    assert run("resume")[0] == 0
    given = [headers["authorization"] for *_, headers in worker.calls]
    assert given == ["Bearer secret", "Bearer other", "Bearer other"]


ERROR = {"status": "error"}


@pytest.mark.parametrize("command", ["drain", "resume"])
@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ((401, ERROR), ExitCode.USAGE, "the worker requires its control token\n  next: give the worker's own with"),
        ((403, ERROR | {"message": "set a control token"}), ExitCode.USAGE, "the worker refuses: set a control token"),
        ((404, ERROR | {"message": "unknown control route"}), ExitCode.FATAL, "got HTTP 404: unknown control route"),
        ((404, {}), ExitCode.FATAL, "expected a worker that can be drained, got HTTP 404\n"),
        ((503, {"state": "STARTING"}), ExitCode.FATAL, "the worker is not serving, its state is STARTING"),
        ((503, ERROR | {"message": "16 operations"}), ExitCode.FATAL, "got HTTP 503: 16 operations"),
        ((200, ERROR | {"message": "try later"}), ExitCode.FATAL, "the worker refuses: try later"),
        ((200, ERROR), ExitCode.FATAL, "the worker refuses: no reason given"),
        ((200, {"status": "success"}), ExitCode.FATAL, "this is not the status server of a worker"),
        ((200, b"<html>"), ExitCode.FATAL, "this is not the status server of a worker"),
        ((200, b"[]"), ExitCode.FATAL, "the worker refuses"),
    ],
)
def test_answers_that_are_errors(worker, run, command, answer, code, message):
    worker.say(answer)
    got, out, err = run(command)
    assert (got, out) == (code, "")
    assert f"dynamo-worker: error: 127.0.0.1:{worker.port}: " in err
    assert message in err


def test_a_wrong_token(worker, run, monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    worker.say((401, ERROR))
    code, _, err = run("drain")
    assert code == ExitCode.USAGE
    assert "the worker does not accept this control token" in err
    assert "secret" not in err


def test_nobody_there(worker, capsys):
    worker.close()
    assert main.main(["drain", str(worker.port)]) == ExitCode.FATAL
    err = capsys.readouterr().err
    assert f"127.0.0.1:{worker.port}: the worker cannot be reached: Connection refused" in err
    assert "--system-port" in err


def test_one_that_does_not_answer(worker, capsys, monkeypatch):
    monkeypatch.setattr(control_client, "_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main.main(["resume", f"127.0.0.1:{server.getsockname()[1]}"]) == ExitCode.FATAL
    assert "the worker cannot be reached: it does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: HOST:PORT"),
        (["localhost"], "expected HOST:PORT"),
        (["9090", "--mode", "now"], "invalid choice: 'now'"),
        (["9090", "--budget", "soon"], "expected a number of seconds between 0 and 604800, got 'soon'"),
        (["9090", "--grace-period=-1"], "expected a number of seconds between 0 and 604800, got '-1'"),
        (["9090", "--wiat"], "unrecognized arguments: --wiat"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert main.main(["drain", *arguments]) == ExitCode.USAGE
    err = capsys.readouterr().err
    assert message in err
    assert "`dynamo-worker drain --help` shows how" in err


@pytest.mark.parametrize("command", ["drain", "resume"])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    shown = capsys.readouterr().out
    for word in ("examples:", "exit codes:", f"dynamo-worker {command} localhost:9090", TOKEN):
        assert word in shown
