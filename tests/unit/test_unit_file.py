"""The example unit for systemd restarts what a restart can mend."""

from __future__ import annotations

from pathlib import Path

from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config.options import BY_NAME

UNIT = Path(__file__).parents[2] / "deploy/systemd/dynamo-worker.service"


def settings() -> dict[str, str]:
    lines = UNIT.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_a_worker_whose_server_is_away_is_started_until_it_is_back():
    """A start waits for --discovery-timeout before it fails; that often must not be too often for systemd."""
    unit = settings()
    assert unit["Restart"] == "on-failure"
    assert str(int(ExitCode.UNREACHABLE)) not in unit["RestartPreventExitStatus"].split()
    seconds = BY_NAME["discovery_timeout"].default + float(unit["RestartSec"])
    assert seconds * int(unit["StartLimitBurst"]) > float(unit["StartLimitIntervalSec"])
    # What a restart cannot mend; the rest is worth another try.
    assert {int(code) for code in unit["RestartPreventExitStatus"].split()} == {ExitCode.USAGE, ExitCode.START_FAILED}


def test_the_guardian_outlives_a_killed_supervisor():
    """It withdraws the worker. With ExitType=main systemd would end it first, with KillMode=process nothing would."""
    unit = settings()
    assert unit["ExitType"] == "cgroup"
    assert unit["KillMode"] == "mixed"


def test_systemd_kills_only_after_the_grace_period():
    unit = settings()
    words = unit["ExecStart"].split()
    assert float(unit["TimeoutStopSec"]) > float(words[words.index("--termination-grace-period") + 1])
