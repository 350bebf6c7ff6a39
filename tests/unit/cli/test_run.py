"""`--print-config` and `--help` of a worker, in this process."""

from __future__ import annotations

import yaml

from dynamo_worker.cli import run
from dynamo_worker.host.config.options import OPTIONS


def test_every_setting_is_printed_with_its_origin(capsys, monkeypatch):
    monkeypatch.setenv("DYN_WORKER_DRAIN", "abort")
    assert run.main(["--print-config", "--system-port", "0"]) == 0
    out = capsys.readouterr().out
    assert set(yaml.safe_load(out)) == {row.name for row in OPTIONS} - {"config"}
    lines = {line.partition(":")[0]: line for line in out.splitlines()}
    assert lines["drain"].split() == ["drain:", "abort", "#", "environment", "DYN_WORKER_DRAIN"]
    assert lines["system_port"].endswith("# flag --system-port")
    assert lines["namespace"].endswith("# default")


def test_conflicts_are_warnings_where_no_worker_starts(capsys):
    assert run.main(["--print-config", "--discovery-backend", "mem"]) == 0
    assert "dynamo-worker: warning: --discovery-backend mem isolates the worker" in capsys.readouterr().err


def test_help_without_the_chosen_engine(capsys):
    assert run.main(["--engine", "no-such-engine", "--help"]) == 0
    printed = capsys.readouterr()
    assert "Exit codes:" in printed.out
    assert printed.err.startswith("dynamo-worker: warning: ")
