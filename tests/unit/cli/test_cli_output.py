"""What commands print, and how they end when output cannot be written."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from dynamo_worker.cli import output
from dynamo_worker.errors import UsageError
from dynamo_worker.exit_codes import ExitCode


class Failing:
    """A stream whose first flush fails."""

    def __init__(self, descriptor, error):
        self.descriptor = descriptor
        self.error = error

    def flush(self):
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def fileno(self):
        return self.descriptor


@pytest.fixture
def descriptor(tmp_path):
    """Return a descriptor that a failed flush may redirect."""
    number = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    yield number
    os.close(number)


def test_errors_are_one_message_on_stderr(capsys):
    output.print_error(UsageError("wrong", hint="do this"))
    assert capsys.readouterr() == ("", "dynamo-worker: error: wrong\n  next: do this\n")


def test_control_characters_of_an_error_are_not_printed(capsys):
    output.print_error(UsageError("red \x1b[31m"))
    assert "\x1b" not in capsys.readouterr().err


def test_columns_in_a_pipe_are_plain_and_aligned(capsys):
    output.print_table(("NAME", "KIND"), [("a", "engine"), ("longer", "")])
    assert capsys.readouterr().out == "NAME    KIND\na       engine\nlonger\n"


def test_a_closed_pipe_ends_a_table_like_print():
    with pytest.raises(BrokenPipeError):
        output.console().on_broken_pipe()


@pytest.mark.parametrize("code", [ExitCode.STOPPED, ExitCode.USAGE])
def test_flushed_output_keeps_the_exit_code(code):
    assert output.finish_output(code) == code


FULL = OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize(
    ("error", "code", "expected", "message"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ExitCode.STOPPED, 141, ""),
        (FULL, ExitCode.STOPPED, ExitCode.FATAL, "dynamo-worker: error: cannot write output: No space left\n"),
        (FULL, ExitCode.USAGE, ExitCode.USAGE, ""),
    ],
)
def test_output_that_cannot_be_flushed(monkeypatch, capsys, descriptor, error, code, expected, message):
    monkeypatch.setattr(sys, "stdout", Failing(descriptor, error))
    assert output.finish_output(code) == expected
    assert capsys.readouterr().err == message
    assert os.readlink(f"/proc/self/fd/{descriptor}") == os.devnull, "the interpreter can flush it at exit"
