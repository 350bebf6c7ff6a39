"""What a worker's status server says about the worker: read from ``/metrics`` and ``/health``, whatever they answer."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Final

from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.text import safe

#: Samples that are read; the metrics of engines are many times as many.
_SAMPLE: Final = re.compile(
    r"^(dynamo_worker_(?:state|drain_phase|in_flight|chunks_total|event_loop_lag_seconds|ready|start_seconds|info)"
    r"|dynamo_component_uptime_seconds)(?:\{([^}\n]{0,2000})\})? (\S{1,40})$",
    re.MULTILINE,
)
_LABEL: Final = re.compile(r'(\w{1,40})="((?:[^"\\]|\\.){0,300})"')
#: Longest text from a worker that is shown, in characters.
MOST_TEXT: Final = 120


@dataclass(frozen=True)
class Sample:
    """One look at a worker; None stands for what it did not say.

    :ivar state: its state, a value of ``State``.
    :ivar phase: the phase of a drain on request, a value of ``DrainPhase``.
    :ivar in_flight: requests in flight.
    :ivar chunks: response chunks sent since it started.
    :ivar lag_s: longest delay of its event loop in the last 5 s, in seconds.
    :ivar start_s: seconds that its start took.
    :ivar age_s: seconds since its runtime started.
    :ivar ready: whether it is ready for requests.
    :ivar reason: why it is not.
    :ivar worker_id: its instance id in discovery, in hexadecimal digits.
    """

    state: str | None = None
    phase: str | None = None
    in_flight: int | None = None
    chunks: float | None = None
    lag_s: float | None = None
    start_s: float | None = None
    age_s: float | None = None
    ready: bool | None = None
    reason: str | None = None
    worker_id: str | None = None
    model: str | None = None
    engine: str | None = None
    version: str | None = None


def from_metrics(text: str) -> Sample:
    """Return what a text in Prometheus' format says; a sample without anything if it says nothing of a worker."""
    values: dict[str, float] = {}
    current: dict[str, str] = {}
    info: dict[str, str] = {}
    for name, labels, value in _SAMPLE.findall(text):
        number = _number(value)
        if number is None:
            continue
        given = dict(_LABEL.findall(labels))
        if name == "dynamo_worker_info":
            info = {key: one_line(label) for key, label in given.items()}
        elif name in ("dynamo_worker_state", "dynamo_worker_drain_phase"):
            if number == 1:
                current[name] = given.get("state") or given.get("phase") or ""
        else:
            values[name.removeprefix("dynamo_worker_")] = number
    ready = values.get("ready")
    in_flight = values.get("in_flight")
    return Sample(
        state=_known(State, current.get("dynamo_worker_state")),
        phase=_known(DrainPhase, current.get("dynamo_worker_drain_phase")),
        in_flight=None if in_flight is None else int(in_flight),
        chunks=values.get("chunks_total"),
        lag_s=values.get("event_loop_lag_seconds"),
        start_s=values.get("start_seconds") or None,  # 0 until the start is over
        age_s=values.get("dynamo_component_uptime_seconds"),
        ready=None if ready is None else ready == 1,
        worker_id=info.get("worker_id"),
        model=info.get("model"),
        engine=info.get("engine"),
        version=info.get("version"),
    )


def from_health(text: bytes) -> tuple[str | None, str | None]:
    """Return the state and the reason in an answer of ``/health``; None for what it does not say."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(answer, dict):
        return None, None
    state, reason = answer.get("state"), answer.get("reason")
    return (
        _known(State, state if isinstance(state, str) else None),
        one_line(reason) if isinstance(reason, str) else None,
    )


def one_line(text: str) -> str:
    """Return a text from elsewhere as a terminal may show it, in one line."""
    return " ".join(safe(text, MOST_TEXT).split())


def _known(kind: type[State | DrainPhase], value: str | None) -> str | None:
    return value if value in {member.value for member in kind} else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
