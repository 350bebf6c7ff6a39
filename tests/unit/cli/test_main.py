"""The error boundary: every error becomes one message and an exit code."""

from __future__ import annotations

import errno

import pytest

from dynamo_worker import __version__
from dynamo_worker.cli import main
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.exit_codes import ExitCode


@pytest.fixture
def raising(monkeypatch):
    """Return a function that runs a command which raises an error, and returns the exit code."""

    def run(error):
        def fail(argv):
            raise error

        monkeypatch.setattr(main, "_dispatch", fail)
        return main.main([])

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("wrong"), ExitCode.USAGE, "dynamo-worker: error: wrong\n"),
        (
            StartError("no GPU", hint="add one"),
            ExitCode.START_FAILED,
            "dynamo-worker: error: no GPU\n  next: add one\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_expected_errors(raising, capsys, error, code, message):
    assert raising(error) == code
    assert capsys.readouterr().err == message


def test_the_exit_of_argparse_is_kept(raising):
    with pytest.raises(SystemExit):
        raising(SystemExit(2))


@pytest.mark.parametrize("error", [RuntimeError("surprise"), FileNotFoundError(errno.ENOENT, "x")])
def test_a_bug_is_a_crash_report(raising, capsys, error):
    assert raising(error) == ExitCode.FATAL
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert f"dynamo-worker {__version__}, ai-dynamo-runtime " in printed
    assert "plugins: " in printed


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dynamo-worker {__version__}\n"
