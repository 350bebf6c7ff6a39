"""The text of `dynamo-worker --help`."""

from __future__ import annotations

import pytest

from dynamo_worker.cli import help as cli_help
from dynamo_worker.cli.commands import COMMANDS
from dynamo_worker.cli.engine_parser import EngineParser
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.host.config.own_flags import SWITCHES


@pytest.mark.parametrize("columns", [80, 500])
def test_lines_fit_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, cli_help.render(None).splitlines())) <= min(columns, 120)


def test_everything_is_explained():
    text = " ".join(cli_help.render(None).split())
    for word in (*COMMANDS, *SWITCHES, *(flag for row in OPTIONS for flag in row.flags)):
        assert word in text
    for row in OPTIONS:
        assert " ".join(row.summary.split()) in text


def test_every_exit_code_is_explained():
    assert set(cli_help.EXIT_CODES) == set(ExitCode)


def test_flags_of_the_engine():
    parser = EngineParser("toy")
    parser.add_argument("--size", help="how large it is")
    text = cli_help.render(parser)
    assert text.index("Flags of --engine toy:") < text.index("--size SIZE") < text.index("Exit codes:")


def test_no_engine_is_installed(monkeypatch):
    monkeypatch.setattr(cli_help, "discover", list)
    assert "Installed engines:\n  none; to add one: pip install dynamo-worker-NAME\n" in cli_help.render(None)
