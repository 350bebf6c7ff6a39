"""Shows watched workers: as rows of a table, as a summary, and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.cli.top.samples import one_line
from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_worker.cli.top.watch import WatchedWorker

#: What is shown instead of a state.
GONE: Final = "gone"
SILENT: Final = "no answer"
#: How urgently somebody should look at a worker, by what is shown of it; others come after them.
_URGENCY: Final = (GONE, SILENT, State.FATAL.value, State.STARTING.value)
#: Seconds for which a restart is a note.
_NOTED_SECONDS: Final = 600.0


def label(worker: WatchedWorker) -> str:
    """Return the state of a worker in one word, or why it is not known."""
    if worker.gone_at is not None:
        return GONE
    sample = worker.sample
    if worker.found.status is None or worker.problem is not None:
        return SILENT
    if sample is None:
        return "asking"
    if sample.phase not in (None, DrainPhase.SERVING.value) and sample.state == State.SERVING.value:
        return str(sample.phase)
    return sample.state or "unknown"


def note(worker: WatchedWorker, now: float) -> str:
    """Return what is worth knowing beyond the figures.

    :param now: the time (monotonic).
    """
    notes = []
    if worker.gone_at is not None:
        last = worker.sample.state if worker.sample is not None else None
        notes.append(f"left discovery {span(now - worker.gone_at)} ago" + (f", was {last}" if last else ""))
    elif worker.found.status is None:
        notes.append("discovery does not say where its status server is")
    elif worker.problem is not None:
        notes.append(worker.problem)
    elif worker.sample is not None and worker.sample.reason is not None:
        notes.append(worker.sample.reason)
    if worker.restarted_at is not None and now - worker.restarted_at < _NOTED_SECONDS:
        notes.append(f"restarted {span(now - worker.restarted_at)} ago")
    return "; ".join(notes)


def span(seconds: float) -> str:
    """Return a time in its largest units: ``12 s``, ``5 min``, ``3 h 20 min``, ``4 d``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d"


def _lag(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _figures(worker: WatchedWorker) -> tuple[float, float, float, float]:
    """Return requests in flight, chunks per second, lag and age; -1 for what is not known."""
    sample = worker.sample if worker.answers else None
    values = (None,) * 4 if sample is None else (sample.in_flight, worker.chunk_rate, sample.lag_s, sample.age_s)
    in_flight, rate, lag, age = (-1.0 if value is None else float(value) for value in values)
    return in_flight, rate, lag, age


def _name(worker: WatchedWorker) -> tuple[str, str, str, str]:
    found = worker.found
    return found.namespace, found.component, found.instance, str(found.status)


def _by_load(worker: WatchedWorker) -> Any:
    in_flight, rate, *_ = _figures(worker)
    return -in_flight, -rate, _name(worker)


def _by_urgency(worker: WatchedWorker) -> Any:
    shown = label(worker)
    if shown in _URGENCY:
        return _URGENCY.index(shown), _by_load(worker)
    ready = worker.sample is not None and worker.sample.ready
    return len(_URGENCY) + bool(ready), _by_load(worker)


#: The orders of rows by name: what each sorts by.
ORDERS: Final[dict[str, Callable[[WatchedWorker], Any]]] = {
    "load": _by_load,
    "rate": lambda worker: (-_figures(worker)[1], _by_load(worker)),
    "lag": lambda worker: (-_figures(worker)[2], _by_load(worker)),
    "age": lambda worker: (_figures(worker)[3] if _figures(worker)[3] >= 0 else math.inf, _by_load(worker)),
    "state": _by_urgency,
    "name": _name,
}

HEADINGS: Final = (
    *("WORKER", "MODEL", "STATUS AT", "STATE", "READY", "IN FLIGHT", "CHUNKS/S", "LAG", "START", "AGE", "NOTE"),
)
#: Columns whose numbers end at the same place.
NUMBERS: Final = ("IN FLIGHT", "CHUNKS/S", "LAG", "START", "AGE")


def row(worker: WatchedWorker, now: float, *, namespaces: bool = False) -> list[str]:
    """Return the cells of a worker, one for each of :data:`HEADINGS`.

    :param now: the time (monotonic).
    :param namespaces: whether to name its namespace.
    """
    found, sample = worker.found, worker.sample if worker.answers else None
    names = [found.namespace] * namespaces + [found.component, found.instance]
    model = (found.models or [""])[0] or (worker.sample.model if worker.sample is not None else None) or "-"
    more = f" +{len(found.models) - 1}" if len(found.models) > 1 else ""
    cells = [
        "/".join(filter(None, names)) or (sample.worker_id if sample is not None else None) or "-",
        model + more,
        "-" if found.status is None else str(found.status),
        label(worker),
        "-" if sample is None or sample.ready is None else "yes" if sample.ready else "no",
        "-" if sample is None or sample.in_flight is None else str(sample.in_flight),
        _shown(worker.chunk_rate, lambda rate: f"{rate:.0f}"),
        _shown(None if sample is None else sample.lag_s, _lag),
        _shown(None if sample is None else sample.start_s, lambda seconds: f"{seconds:.1f} s"),
        _shown(None if sample is None else sample.age_s, span),
        note(worker, now),
    ]
    return [one_line(cell) for cell in cells]


def summary(workers: Iterable[WatchedWorker]) -> str:
    """Return how many workers there are of each state, and what they do together."""
    states: Counter[str] = Counter()
    in_flight, rate = 0, 0.0
    for worker in workers:
        states[label(worker)] += 1
        known = _figures(worker)
        in_flight += int(max(0, known[0]))
        rate += max(0, known[1])
    count = sum(number for state, number in states.items() if state != GONE)
    each = ", ".join(f"{number} {state}" for state, number in sorted(states.items(), key=lambda item: -item[1]))
    return (
        f"{count} worker{'' if count == 1 else 's'}{each and f': {each}'}; {in_flight} in flight, {rate:.0f} chunks/s"
    )


def as_json(worker: WatchedWorker, now: float) -> dict[str, Any]:
    """Return what is known of a worker; what is not known is null.

    :param now: the time (monotonic).
    """
    found, sample = worker.found, worker.sample if worker.answers else None
    return {
        "namespace": found.namespace or None,
        "component": found.component or None,
        "instance": found.instance or (sample.worker_id if sample is not None else None),
        "models": found.models or ([sample.model] if sample is not None and sample.model else []),
        "status_address": None if found.status is None else str(found.status),
        "state": label(worker),
        "drain_phase": None if sample is None else sample.phase,
        "ready": None if sample is None else sample.ready,
        "reason": note(worker, now) or None,
        "in_flight": None if sample is None else sample.in_flight,
        "chunks_per_s": None if worker.chunk_rate is None else round(worker.chunk_rate, 1),
        "event_loop_lag_s": None if sample is None else sample.lag_s,
        "start_s": None if sample is None else sample.start_s,
        "age_s": None if sample is None else sample.age_s,
        "restarted_s_ago": None if worker.restarted_at is None else round(now - worker.restarted_at, 1),
        "engine": None if sample is None else sample.engine,
        "version": None if sample is None else sample.version,
    }


def fitting(workers: Sequence[WatchedWorker], lines: int) -> tuple[Sequence[WatchedWorker], str]:
    """Return the workers that fit into some lines, and what to say of the others."""
    shown, hidden = workers[:lines], workers[lines:]
    if not hidden:
        return shown, ""
    unready = sum(not worker.answers or worker.sample is None or not worker.sample.ready for worker in hidden)
    return shown, f"… {len(hidden)} more, {unready} of them not ready (--sort state shows those first)"
