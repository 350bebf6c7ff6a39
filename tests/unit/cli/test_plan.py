"""`dynamo-worker plan`: the timeline as a table and as JSON."""

from __future__ import annotations

import json

import pytest

from dynamo_worker.cli import plan
from dynamo_worker.supervisor.protocol import FORCED_STOP


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("DYN_WORKER_CONFIG", "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "DYN_WORKER_DRAIN"):
        monkeypatch.delenv(name, raising=False)


def test_json(capsys):
    assert plan.main(["--termination-grace-period=60", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["total"], printed["drain_mode"], printed["fits"]) == (60, "complete", True)
    assert [stage["name"] for stage in printed["stages"]] == ["unregister", "grace", "drain", "cleanup", "kill_reserve"]
    assert printed["stages"][-1]["end"] == 60
    assert printed["forced_stop"] == FORCED_STOP
    assert printed["warnings"] == []


@pytest.mark.parametrize("mode", ["complete", "handoff", "abort"])
def test_table(capsys, mode):
    assert plan.main(["--drain", mode]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Shutdown within 30 s, drain mode {mode}"
    names = [line.split()[0] for line in lines if line[:1].islower()]
    assert names == ["unregister", "grace", "drain", "cleanup", "kill"]
    assert lines[-1] == "Everything fits."


def test_stages_that_do_not_fit(capsys):
    assert plan.main(["--grace-period", "29"]) == 0
    out = capsys.readouterr().out
    assert "warning: " in out
    assert "Everything fits." not in out
