"""Files in the directory where a worker is started must not become code of the worker."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dynamo_worker.supervisor import interpreter

TRAP = "import os; os.write(2, b'TRAPPED'); os._exit(9)"
#: Modules that our processes import: their own, others', and Python's.
TRAPS = ("uvloop", "multiprocessing", "runpy", "importlib", "json", "yaml", "setproctitle", "pluggy", "dynamo_worker")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    return done.stdout + done.stderr


@pytest.mark.parametrize("safe", [True, False], ids=["-P", "Python 3.10"])
class TestOurCommands:
    @pytest.fixture(autouse=True)
    def python(self, safe, monkeypatch):
        if safe and not interpreter.has_safe_path():
            pytest.skip("this Python has no -P")
        monkeypatch.setattr(interpreter, "has_safe_path", lambda: safe)

    def test_a_module(self, trap):
        assert run(*interpreter.module_command("dynamo_worker"), "--version").startswith("dynamo-worker ")
        command = [*interpreter.module_command("dynamo_worker"), "--engine", "echo", "x", "--no-supervise"]
        assert "unexpected argument" in run(*command)

    def test_code(self, trap):
        code = "import json, sys; print(sys.path.count(''), sys.argv[1])"
        assert run(sys.executable, *interpreter.code_arguments(code), "x") == "0 x\n"

    def test_multiprocessing(self, trap, safe):
        code = """if True:
            import sys
            from multiprocessing import get_context
            from dynamo_worker.supervisor import interpreter
            interpreter.has_safe_path = lambda: sys.argv[1] == "True"
            interpreter.protect_multiprocessing()
            process = get_context("spawn").Process(target=print, args=("done",))
            process.start()
            process.join()
        """
        assert run(sys.executable, *interpreter.code_arguments(code), str(safe)) == "done\n"


def test_the_worker_and_its_frontend(trap):
    """The supervisor is started as a script, as `dynamo-worker` is."""
    script = f"{os.path.dirname(sys.executable)}/dynamo-worker"
    text = run(script, "--engine", "echo", "--discovery-path", str(trap / "kv"), "--frontend", "127.0.0.1:70000")
    assert "TRAPPED" not in text
    text = run(script, "--engine", "nothing")
    assert "TRAPPED" not in text
    assert "nothing" in text


def test_what_the_worker_starts(supervised):
    supervised.environment.pop(interpreter.SAFE_PATH, None)
    path = supervised.base / "environment"
    supervised.start(f"environment={path}", "exit=0")
    supervised.wait()
    assert f'"{interpreter.SAFE_PATH}": "1"' in path.read_text()


def test_nothing_but_what_python_has_added_is_taken_off_the_path(monkeypatch):
    monkeypatch.setattr(sys, "flags", None)
    monkeypatch.setattr(sys, "argv", ["/opt/bin/dynamo-worker"])
    for first, stays in (("/opt/bin", False), ("", False), (os.getcwd(), False), ("/opt/lib", True)):
        monkeypatch.setattr(sys, "path", [first, "/x"])
        interpreter.leave_script_directory()
        assert (first in sys.path) == stays
        assert sys.path[-1] == "/x"
