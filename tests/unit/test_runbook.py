"""The runbook has a section for each alert and for each kind of end, and `explain` and the alerts lead there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dynamo_worker.cli.explain.advice import RUNBOOK, runbook_link
from dynamo_worker.supervisor.exit_kinds import ExitKind

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = re.findall(r"(?ms)^### (\S+)\n(.*?)(?=^##|\Z)", (ROOT / RUNBOOK).read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text(encoding="utf-8"))["spec"]["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize(("name", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_each_section_says_what_to_do(name: str, text: str):
    assert re.findall(r"^- \*\*(.+?)\*\*: ", text, re.MULTILINE) == ["Means", "Look at", "Do"], name


def test_all_alerts_and_all_kinds_of_ends():
    expected = [*(rule["alert"] for rule in RULES), *(kind.value for kind in ExitKind)]
    assert [name for name, _ in SECTIONS] == expected


@pytest.mark.parametrize("kind", ExitKind)
def test_explain_leads_there(kind: ExitKind):
    assert runbook_link(kind) == f"{RUNBOOK}#{kind.value}"


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_alerts_lead_there(rule: dict[str, dict[str, str]]):
    assert rule["annotations"]["runbook"] == f"{RUNBOOK}#{str(rule['alert']).lower()}"
