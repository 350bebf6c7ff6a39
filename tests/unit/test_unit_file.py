"""The example unit for systemd restarts what a restart can mend."""

from __future__ import annotations

from pathlib import Path

from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config.options import BY_NAME

UNIT = Path(__file__).parents[2] / "deploy/systemd/dynamo-worker.service"


def test_a_worker_whose_server_is_away_is_started_until_it_is_back():
    """A start waits for --discovery-timeout before it fails; that often must not be too often for systemd."""
    lines = UNIT.read_text().splitlines()
    unit = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert unit["Restart"] == "on-failure"
    assert str(int(ExitCode.UNREACHABLE)) not in unit["RestartPreventExitStatus"].split()
    seconds = BY_NAME["discovery_timeout"].default + float(unit["RestartSec"])
    assert seconds * int(unit["StartLimitBurst"]) > float(unit["StartLimitIntervalSec"])
