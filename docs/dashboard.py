"""The Grafana dashboard of workers, ``deploy/monitoring/dashboard.json``; written by ``docs/generate.py``.

Each of the worker's own metrics has to be on it, or named in ``_LEFT_OUT`` with the reason: :func:`dashboard` fails
otherwise, so a new metric cannot be forgotten.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Metrics that are on no panel, and why.
_LEFT_OUT: Final[Mapping[str, str]] = {
    "dynamo_worker_fatal_errors_total": "the worker ends within seconds, so it is seldom scraped",
    "dynamo_worker_event_loop_lag_seconds": "the histogram of the delays says the same of any time",
}
#: Grafana's grid is so many units wide.
_WIDTH: Final = 24
_HEIGHT: Final = 8


class Panel(NamedTuple):
    """One panel of the dashboard."""

    title: str
    #: Expressions by legend; ``$`` stands for the selected workers' matchers.
    queries: Mapping[str, str]
    #: A unit of Grafana's.
    unit: str = "short"
    kind: str = "timeseries"
    #: Of 24.
    width: int = 8
    #: What the panel says, for its tooltip.
    text: str = ""
    stacked: bool = False


_ROWS: Final[Mapping[str, Sequence[Panel]]] = {
    "Fleet": (
        Panel("Ready", {"ready": "sum(dynamo_worker_ready{$})"}, kind="stat", width=4, text="/health answers 200"),
        Panel("Workers", {"workers": "count(dynamo_worker_info{$})"}, kind="stat", width=4),
        Panel("In flight", {"requests": "sum(dynamo_worker_in_flight{$})"}, kind="stat", width=4),
        Panel(
            "Workers seen in the last 30 minutes, per place",
            {
                "{{pod}} {{instance}}": "count by (pod, instance) (count by (pod, instance, worker_id)"
                " (max_over_time(dynamo_worker_info{$}[30m])))"
            },
            width=12,
            text="More than one: it has restarted",
        ),
        Panel(
            "Workers by state",
            {"{{state}}": "sum by (state) (dynamo_worker_state{$})"},
            width=12,
            stacked=True,
            text="The start is not in it: metrics exist once the engine is up",
        ),
        Panel(
            "Drains on request, by phase",
            {"{{phase}}": 'sum by (phase) (dynamo_worker_drain_phase{$, phase!="serving"})'},
            width=12,
            stacked=True,
        ),
    ),
    "Requests": (
        Panel(
            "Ended requests by outcome",
            {"{{outcome}}": "sum by (outcome) (rate(dynamo_worker_requests_total{$}[$__rate_interval]))"},
            "reqps",
            width=12,
            stacked=True,
        ),
        Panel(
            "Chunks (most engines: tokens)",
            {"{{instance}}": "rate(dynamo_worker_chunks_total{$}[$__rate_interval])"},
            "cps",
            width=12,
        ),
        Panel("In flight", {"{{instance}}": "dynamo_worker_in_flight{$}"}, width=12),
        Panel(
            "Slow clients",
            {"{{instance}}": "dynamo_worker_slow_clients{$}"},
            width=12,
            text="Streams whose clients do not read",
        ),
    ),
    "Health": (
        Panel(
            "Event loop: 99th percentile of its delay",
            {
                "{{instance}}": "histogram_quantile(0.99, sum by (instance, le)"
                " (rate(dynamo_worker_event_loop_delay_seconds_bucket{$}[$__rate_interval])))"
            },
            "s",
            text="All streams stand still for that long",
        ),
        Panel(
            "Health checks: 90th percentile",
            {
                "{{instance}}": "histogram_quantile(0.9, sum by (instance, le)"
                " (rate(dynamo_worker_health_check_seconds_bucket{$}[$__rate_interval])))"
            },
            "s",
        ),
        Panel(
            "Failed health checks",
            {"{{instance}}": "increase(dynamo_worker_health_check_failures_total{$}[$__rate_interval])"},
        ),
    ),
    "Start and end": (
        Panel("Seconds from the process to ready", {"{{instance}}": "dynamo_worker_start_seconds{$}"}, "s"),
        Panel(
            "Seconds in each stage of a shutdown",
            {"{{stage}} {{instance}}": "dynamo_worker_shutdown_stage_seconds{$}"},
            "s",
        ),
        Panel(
            "Time left until a shutdown is cut short",
            {
                "{{instance}}": "dynamo_worker_shutdown_deadline_timestamp_seconds{$} - time()"
                " > -3600 and dynamo_worker_shutdown_deadline_timestamp_seconds{$} > 0"
            },
            "s",
        ),
        Panel(
            "Time since the end of the worker before",
            {"{{instance}}": "time() - (dynamo_worker_last_exit_timestamp_seconds{$} > 0)"},
            "s",
            text="By the flight records; `dynamo-worker explain` says more",
        ),
        Panel(
            "Why the worker before ended",
            {"{{reason}} {{instance}}": "dynamo_worker_last_exit_reason{$}"},
            text="The words are those of the runbook",
        ),
        Panel("Exit code of the worker before", {"{{instance}}": "dynamo_worker_last_exit_code{$}"}),
    ),
}


def dashboard(metrics: Mapping[str, str]) -> str:
    """Return the dashboard as JSON.

    :param metrics: the worker's own metrics: type by name.
    :raises SystemExit: a metric is on no panel, or a panel shows one that does not exist.
    """
    shown = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for panels in _ROWS.values()
        for panel in panels
        for query in panel.queries.values()
        for name in re.findall(r"dynamo_worker_\w+", query)
    }
    if shown | set(_LEFT_OUT) != set(metrics):
        raise SystemExit(
            f"docs/dashboard.py: on no panel: {sorted(set(metrics) - shown - set(_LEFT_OUT))}; "
            f"unknown: {sorted((shown | set(_LEFT_OUT)) - set(metrics))}"
        )
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in _ROWS.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": top, "w": _WIDTH, "h": 1}}
        )
        top, left = top + 1, 0
        for panel in row:
            if left + panel.width > _WIDTH:
                top, left = top + _HEIGHT, 0
            panels.append(_panel(panel, {"x": left, "y": top, "w": panel.width, "h": _HEIGHT}))
            left += panel.width
        top += _HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    board = {
        "title": "Dynamo workers",
        "uid": "dynamo-workers",
        "tags": ["dynamo", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }
    return json.dumps(board, indent=2) + "\n"


def _panel(panel: Panel, place: Mapping[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "gridPos": dict(place),
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": source,
                "expr": query.replace("{$", '{job=~"$job", instance=~"$instance"'),
                "legendFormat": legend,
            }
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }
    if panel.stacked:
        made["fieldConfig"]["defaults"]["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 20}
    return made


def _variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    everything = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "job", "type": "query", "datasource": source, "refresh": 2, **everything,
            "query": "label_values(dynamo_worker_info, job)",
        },
        {
            "name": "instance", "label": "worker", "type": "query", "datasource": source, "refresh": 2, **everything,
            "query": 'label_values(dynamo_worker_info{job=~"$job"}, instance)',
        },
    ]  # fmt: skip
