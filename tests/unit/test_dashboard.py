"""The Grafana dashboard shows every metric of the worker, with expressions that Prometheus takes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "deploy" / "monitoring" / "dashboard.json"


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("dashboard")


def test_a_metric_on_no_panel_fails(dashboard: ModuleType):
    with pytest.raises(SystemExit, match=r"on no panel: \['dynamo_worker_new'\]; unknown: \['dynamo_worker_ch"):
        dashboard.dashboard({"dynamo_worker_new": "gauge"})


def test_panels_do_not_overlap():
    taken: dict[tuple[int, int], str] = {}
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_takes_every_expression(tmp_path: Path):
    queries = [query["expr"] for panel in json.loads(BOARD.read_text())["panels"] for query in panel.get("targets", [])]
    assert len(queries) > 10
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
