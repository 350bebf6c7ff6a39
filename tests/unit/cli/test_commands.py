"""The commands: their names, and the arguments of those that take no settings."""

from __future__ import annotations

import pytest

from dynamo_worker.cli import main
from dynamo_worker.cli.commands import COMMANDS, only_flags, unknown_command
from dynamo_worker.errors import UsageError


def test_a_misspelled_command_has_a_suggestion_and_the_list():
    error = unknown_command("engin")
    assert error.args[0] == "unknown command 'engin', did you mean engines?"
    assert all(name in error.hint for name in COMMANDS)


def test_the_name_of_an_engine_is_not_a_command():
    error = unknown_command("echo")
    assert error.args[0] == "unknown command 'echo'"
    assert error.hint == "to run this engine: dynamo-worker --engine echo"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(capsys, name):
    try:
        code = main.main([name, "--help"])
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 0
    assert f"usage: dynamo-worker {name}" in capsys.readouterr().out


def test_flags():
    assert only_flags(["--json", "-h"], ("--json", "-h"), "usage") == {"--json", "-h"}
    assert only_flags([], ("--json",), "usage") == set()


@pytest.mark.parametrize(
    ("word", "message"), [("--jsn", "unknown argument '--jsn', did you mean --json?"), ("x", "unknown argument 'x'")]
)
def test_other_arguments_are_refused_with_the_usage(word, message):
    with pytest.raises(UsageError) as caught:
        only_flags([word], ("--json",), "dynamo-worker engines [--json]")
    assert caught.value.args[0] == message
    assert caught.value.hint == "usage: dynamo-worker engines [--json]"
