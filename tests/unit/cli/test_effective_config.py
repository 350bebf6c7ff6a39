"""The effective configuration: what is shown, and what is written to a file."""

from __future__ import annotations

import argparse
import os

import pytest
import yaml

from dynamo_worker.cli import effective_config
from dynamo_worker.cli.engine_parser import EngineParser
from dynamo_worker.host.config.settings import load


def parsed(**given):
    parser = EngineParser("toy")
    parser.add_argument("--model")
    parser.add_argument("--api-key")
    return parser, argparse.Namespace(**{"model": None, "api_key": None, **given})


def dump(path, **given):
    effective_config.dump(path, load({"drain": "abort"}, {}), *parsed(**given), {"DYN_TCP_TLS_KEY_PATH": "/k"})


def test_a_file_with_everything(tmp_path):
    path = tmp_path / "new" / "dump.yaml"
    dump(path, model="m", api_key="secret")
    text = path.read_text()
    values = yaml.safe_load(text)
    assert (values["drain"], values["engine_args"]["model"]) == ("abort", "m")
    assert "# flag --drain" in text
    assert "# DYN_TCP_TLS_KEY_PATH=/k" in text
    assert "secret" not in text


def test_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "dump.yaml"
    path.write_text("x" * 100_000)
    dump(path)
    assert "x" * 100 not in path.read_text()


def test_a_long_value_is_cut_off(tmp_path):
    dump(tmp_path / "dump.yaml", model="m" * 1_000_000)
    assert (tmp_path / "dump.yaml").stat().st_size < 200_000


@pytest.mark.parametrize("kind", ["directory", "fifo", "below a file", "forbidden"])
def test_a_file_that_cannot_be_written_is_logged(tmp_path, capsys, kind):
    from dynamo_worker import logs

    logs.setup("info", "text")
    path = tmp_path / "dump.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "below a file":
        path.write_text("")
        path = path / "dump.yaml"
    else:
        path = tmp_path / ("x" * 300)
    dump(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Cannot write the configuration" in line
    assert str(path) in line


def test_a_worker_writes_it_before_its_engine_starts(command):
    script = (
        "from dynamo_worker.cli import run; from dynamo_worker.host import launcher; "
        "launcher.run = lambda *_: len(open('dump.yaml').read()); "
        "assert run.main(['--engine', 'echo', '--namespace', 'n', '--discovery-backend', 'file']) > 100"
    )
    result = command.python("-c", script, environment={"DYN_DUMP_CONFIG_TO": "dump.yaml"})
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((command.directory / "dump.yaml").read_text())["namespace"] == "n"


def test_flags_of_the_runtime(command):
    argv = ["--response-plane", "quic", "--tcp-tls-insecure", "--engine-request-limit=5", "--print-config"]
    text = command("--engine", "echo", *argv).stdout
    for line in ("# DYN_RESPONSE_PLANE=quic", "# DYN_TCP_TLS_INSECURE=1", "# DYN_ENGINE_REQUEST_LIMIT=5"):
        assert line in text
    script = (
        "import os, sys; from dynamo_worker.cli import run; "
        "run.main(['--engine', 'echo', '--nats-tls-insecure', '--no-tcp-tls-insecure', '--print-config']); "
        "print(os.environ.get('NATS_TLS_INSECURE'), 'DYN_TCP_TLS_INSECURE' in os.environ, file=sys.stderr)"
    )
    assert command.python("-c", script, environment={"DYN_TCP_TLS_INSECURE": "1"}).stderr.split() == ["1", "False"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--response-plane", "smoke"], "--response-plane smoke: expected one of tcp, quic"),
        (["--engine-request-limit", "0"], "--engine-request-limit 0: expected an integer between 1 and"),
        (["--tcp-tls-key-path"], "--tcp-tls-key-path requires a value: FILE"),
    ],
)
def test_wrong_flags_of_the_runtime(command, argv, message):
    result = command("--engine", "echo", "--no-supervise", *argv)
    assert result.returncode == 2
    assert message in result.stderr
