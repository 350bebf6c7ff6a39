"""The supervisor reads its settings as the worker does, from every source."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dynamo_worker.host.config.config_file import read_config
from dynamo_worker.host.config.settings import load
from dynamo_worker.supervisor.early_settings import EarlySettings


def written(tmp_path, text):
    path = tmp_path / "worker.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "log_format: json\n",
        "engine: echo\nlog_format:   json  # for the collector\n",
        "log_format: 'json'\n",
        'log_format : "json" # x\nengine_args:\n  log_format: text\n',
        "log_format: json",
    ],
)
def test_the_file_is_read_as_the_worker_reads_it(tmp_path, monkeypatch, text):
    path = written(tmp_path, text)
    monkeypatch.delenv("DYN_WORKER_LOG_FORMAT", raising=False)
    assert load({}, {}, read_config(tmp_path / "worker.yaml")).log_format == "json"
    assert EarlySettings(["--config", path]).get("log_format", "text") == "json"
    assert EarlySettings([f"--config={path}"]).get("log_format", "text") == "json"
    assert EarlySettings(["--config", "/none", "--worker-config", path]).get("log_format", "text") == "json"
    monkeypatch.setenv("DYN_WORKER_CONFIG", path)
    assert EarlySettings([]).get("log_format", "text") == "json"
    assert EarlySettings(["--", "--config", "/none"]).get("log_format", "text") == "json"


@pytest.mark.parametrize(
    "text", ["# log_format: json\n", "engine_args:\n  log_format: json\n", "my_log_format: json\n", "log_format:json\n"]
)
def test_other_lines_are_not_settings(tmp_path, text):
    assert EarlySettings(["--config", written(tmp_path, text)]).get("log_format", "text") == "text"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    argv = ["--config", written(tmp_path, "termination_grace_period: 1\n")]
    assert EarlySettings(argv).get("termination_grace_period", "") == "1"
    monkeypatch.setenv("DYN_WORKER_TERMINATION_GRACE_PERIOD", "")
    assert EarlySettings(argv).get("termination_grace_period", "") == "1", "empty is unset"
    monkeypatch.setenv("DYN_WORKER_TERMINATION_GRACE_PERIOD", "2")
    assert EarlySettings(argv).get("termination_grace_period", "") == "2"
    assert EarlySettings([*argv, "--termination-grace-period=3"]).get("termination_grace_period", "") == "3"


def test_a_variable_with_an_unusual_name(tmp_path, monkeypatch):
    argv = ["--config", written(tmp_path, "discovery_path: /file\n")]
    monkeypatch.delenv("DYN_FILE_KV", raising=False)
    assert EarlySettings(argv).get("discovery_path", "", variable="DYN_FILE_KV") == "/file"
    monkeypatch.setenv("DYN_FILE_KV", "/variable")
    assert EarlySettings(argv).get("discovery_path", "", variable="DYN_FILE_KV") == "/variable"


@pytest.mark.parametrize("name", ["", "missing.yaml", ".", "pipe", "binary", "with\0zero"])
def test_what_cannot_be_read_is_left_to_the_worker(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")  # as in `--config <(...)`: it can be read only once, and perhaps never
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00log_format")
    path = f"{tmp_path}/{name}" if name else ""
    assert EarlySettings(["--config", path]).get("log_format", "text") == "text"


@pytest.mark.parametrize("log_format", ["json", "JSON"])
def test_every_line_of_the_supervisor_is_json(supervised, tmp_path, log_format):
    path = written(tmp_path, f"engine: echo\nlog_format: {log_format}\n")
    supervised.environment["DYN_WORKER_CONFIG"] = path
    supervised.start("state=SERVING", "arrived", "exit=0")
    supervised.wait()
    assert len(supervised.events()) == len(supervised.text.splitlines()) >= 2


def test_a_format_that_only_the_worker_understands_comes_with_its_settings(supervised, tmp_path):
    supervised.environment["DYN_WORKER_CONFIG"] = written(tmp_path, "{engine: echo, log_format: json}")
    supervised.start('settings={"log_format":"json"}', "state=SERVING", "arrived", "obey=0")
    supervised.signal(signal.SIGTERM)
    assert supervised.wait() == 0
    assert {"Received shutdown signal", "Worker stopped"} <= {event["message"] for event in supervised.events()}


def test_the_guardian_logs_json_too(supervised, tmp_path):
    supervised.environment["DYN_WORKER_CONFIG"] = written(tmp_path, "log_format: json\n")
    supervised.start("state=SERVING", "arrived", "hang")
    os.kill(supervised.pid, 9)
    supervised.wait()
    supervised.gone()
    assert "guardian" in supervised.text
    assert len(supervised.events()) == len(supervised.text.splitlines())


def test_it_needs_the_standard_library_only():
    program = "import sys, dynamo_worker.supervisor; sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
