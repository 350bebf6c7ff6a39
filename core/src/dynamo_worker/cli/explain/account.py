"""Derives from the entries of a flight record what a person wants to know about the end of a worker. No I/O.

Records may be damaged: every field is checked before it is used.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Final

from dynamo_worker.cli.explain.advice import ADVICE, runbook_link
from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.exit_kinds import ExitKind
from dynamo_worker.supervisor.recorder import CODE_OF_A_KILL
from dynamo_worker.supervisor.worker_status import ENDING

Entry = dict[str, Any]

#: The stage of the plan that each state is; the others are not planned.
_STAGES: Final = {
    "STARTING": "start",
    "SERVING": "serve",
    "UNREGISTERING": "unregister",
    "GRACE": "grace",
    "DRAINING": "drain",
    "CLEANUP": "cleanup",
    "FATAL": "fatal",
}

#: Outcomes of requests that a worker ended before they were complete.
_CUT: Final = ("handed_off", "aborted", "failed", "slow_client")


@dataclass(frozen=True)
class Stage:
    """One stage of a worker's life.

    :param start: when it began, in seconds since the start.
    :param took: its duration in seconds.
    :param planned: the most that it was to take, in seconds; None if nothing was planned.
    """

    name: str
    start: float
    took: float
    planned: float | None = None


@dataclass(frozen=True)
class Exit:
    """The end: what the caller saw, and why.

    :param stage: the state in which the cause struck.
    :param by: who completed the record: ``supervisor``, ``guardian``, ``next start``; ``nobody`` if all were killed.
    """

    code: int
    kind: str
    reason: str
    stage: str
    by: str
    next: str
    runbook: str


@dataclass(frozen=True)
class Requests:
    """What became of the requests.

    :param finished: those that completed during the end.
    :param cut: those that the worker ended before they were complete, by outcome.
    :param lost: those in flight when the process died. Frontends continue them on other workers.
    :param total: all ended requests of its life, by outcome.
    """

    finished: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    total: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Account:
    """The account of one worker's life. Times are seconds since its supervisor started."""

    file: str
    version: str
    started: float
    host: str
    pid: int
    engine: str
    model: str
    instance: str
    running: bool
    ran: float
    exit: Exit | None
    requests: Requests
    drain: str
    stages: list[Stage]
    steps: list[Entry]
    hooks: list[Entry]
    deaths: list[Entry]
    signals: list[Entry]
    cleaned: Entry
    samples: list[Entry]
    notes: list[Entry]
    dropped: int

    def as_json(self) -> Entry:
        """Return it as what JSON knows."""
        return dataclasses.asdict(self)


def account(file: str, entries: list[Entry], *, running: bool) -> Account:
    """Return the account of a record.

    :param file: its path.
    :param entries: its entries, of a format that we know.
    :param running: whether its supervisor or guardian lives.
    """
    start = _last(entries, "start")
    end = _last(entries, "end")
    # The next start may come hours later.
    at = max((number(entry.get("t")) for entry in entries if entry.get("by") != "next start"), default=0.0)
    states = [entry for entry in entries if entry["event"] == "state" and text(entry.get("state")) in State.__members__]
    cleaned = _last(entries, "cleaned") or _mapping(end.get("cleaned"))
    ready = _last(entries, "ready")
    return Account(
        file=file,
        version=text(start.get("version")),
        started=number(start.get("time")),
        host=text(start.get("host")),
        pid=int(number(start.get("pid"))),
        engine=text(_last(entries, "settings").get("engine")),
        model=text(ready.get("model")),
        instance=text(ready.get("instance")),
        running=running and not end,
        ran=number(end.get("ran")) or at,
        exit=None if running and not end else _exit(end, states, at),
        requests=_requests(entries, states),
        drain=text((_last(entries, "plan") or _last(entries, "settings")).get("drain")),
        stages=_stages(entries, states, end, at),
        steps=_named(entries, "step", "name"),
        hooks=_named(entries, "hook", "hook"),
        deaths=_named(entries, "death", "what"),
        signals=_signals(entries),
        cleaned={key: value for key, value in cleaned.items() if key not in ("t", "event")},
        samples=_named(entries, "sample", "t"),
        notes=_troubles(entries),
        dropped=sum(int(number(entry.get("lines", entry.get("entries")))) for entry in entries
                    if entry["event"] in ("gap", "suppressed")),
    )  # fmt: skip


def unknowns(told: Account) -> list[str]:
    """Return what an account of an end does not tell: the cause, the stage, what was cut, what was cleaned."""
    missing = []
    if told.exit is None:
        return ["the end"]
    known = {"cause": told.exit.reason, "stage": told.exit.stage, "next step": told.exit.next, "kind": told.exit.kind}
    missing += [what for what, said in known.items() if not said or "unknown" in said]
    if not told.cleaned:
        missing.append("what was cleaned")
    if told.exit.kind not in list(ExitKind):
        missing.append("kind")
    if not told.stages:
        missing.append("stages")
    if not any(death.get("what") for death in told.deaths) and told.exit.by in ("supervisor", "guardian"):
        missing.append("how the worker's process ended")
    missing += [f"signal of {death['what']}" for death in told.deaths if "unknown" in str(death.get("signal", ""))]
    return missing


def number(value: object) -> float:
    """Return a finite number, or 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return 0.0
    return float(value) if abs(value) < 1e15 else 0.0


def text(value: object) -> str:
    """Return a text, or an empty one for anything else."""
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> Entry:
    return value if isinstance(value, dict) else {}


def _last(entries: list[Entry], event: str) -> Entry:
    return next((entry for entry in reversed(entries) if entry["event"] == event), {})


def _named(entries: list[Entry], event: str, name: str) -> list[Entry]:
    """Return the entries of one kind that have a field, without their kind."""
    found = [entry for entry in entries if entry["event"] == event and entry.get(name) is not None]
    return [{key: value for key, value in entry.items() if key != "event"} for entry in found]


def _troubles(entries: list[Entry]) -> list[Entry]:
    """Return the warnings and errors, without the line that tells the end once more."""
    notes = _named(entries, "note", "message")
    return [note for note in notes if note.get("level") in ("WARNING", "ERROR") and note["message"] != "Worker stopped"]


def _signals(entries: list[Entry]) -> list[Entry]:
    notes = [entry for entry in _named(entries, "note", "message") if entry["message"] == "Received shutdown signal"]
    found = []
    for entry in notes:
        fields = _mapping(entry.get("fields"))
        found.append({
            "t": number(entry.get("t")),
            "signal": text(fields.get("signal")),
            "level": int(number(fields.get("stop_level"))),
        })  # fmt: skip
    return found


def _exit(end: Entry, states: list[Entry], at: float) -> Exit:
    try:
        kind = ExitKind(end.get("kind"))
    except ValueError:
        kind = ExitKind.ALL_KILLED
    reason = text(end.get("reason"))
    if not end:
        reason = f"supervisor and guardian were killed at once, or the machine went down, soon after {at:.1f} s"
    return Exit(
        code=int(number(end["code"])) if "code" in end else CODE_OF_A_KILL,
        kind=kind.value,
        reason=reason,
        stage=_stage_of_the_cause(states),
        by=text(end.get("by")) or "nobody",
        next=ADVICE[kind],
        runbook=runbook_link(kind),
    )


def _stage_of_the_cause(states: list[Entry]) -> str:
    """Return the state in which the worker was when its end began, or the last one that it reached."""
    named = [text(entry["state"]) for entry in states]
    if "FATAL" in named[1:]:
        return named[named.index("FATAL") - 1]
    return named[-1] if named else "LOADING"


def _requests(entries: list[Entry], states: list[Entry]) -> Requests:
    reports = [entry for entry in entries if entry["event"] in ("state", "exit", "sample") and "counts" in entry]
    if not reports:
        return Requests()
    total = {text(name): int(number(count)) for name, count in _mapping(reports[-1]["counts"]).items()}
    ending = next((entry for entry in states if entry["state"] in ENDING), reports[-1])
    before = {text(name): int(number(count)) for name, count in _mapping(ending.get("counts")).items()}
    grown = {name: count - before.get(name, 0) for name, count in total.items()}
    return Requests(
        finished=max(0, grown.get("completed", 0)),
        cut={name: grown[name] for name in _CUT if grown.get(name, 0) > 0},
        lost=int(number(reports[-1].get("in_flight"))),
        total=total,
    )


def _stages(entries: list[Entry], states: list[Entry], end: Entry, at: float) -> list[Stage]:
    """Return the stages in order, from the import of the code to the clean-up by the supervisor."""
    plan = _mapping((_last(entries, "plan") or _last(entries, "settings")).get("plan"))
    died = next((number(entry.get("t")) for entry in entries if _is_death_of_worker(entry)), at)
    seen: list[Entry] = []
    for entry in states:
        if not seen or seen[-1]["state"] != entry["state"]:  # a phase of a drain on request repeats it
            seen.append(entry)
    begins = [number(entry.get("t")) for entry in seen]
    found = [Stage("load", 0.0, begins[0] if begins else died)]
    for entry, begin, until in zip(seen, begins, [*begins[1:], died][: len(seen)], strict=True):
        name = _STAGES.get(entry["state"])
        if name is not None:
            found.append(Stage(name, begin, max(0.0, until - begin), _planned(name, entry, plan)))
    asked = any(entry["state"] in ENDING for entry in seen)
    if end:
        reserve = plan.get("kill_reserve")
        planned = number(reserve) if asked and reserve is not None else None
        found.append(Stage("kill", died, max(0.0, at - died), planned))
    return found


def _planned(name: str, entry: Entry, plan: Entry) -> float | None:
    left = entry.get("deadline_in")
    planned = plan.get(name)
    if name == "fatal":
        return number(left) if left is not None else None
    if planned is None:
        return None
    return min(number(planned), number(left)) if left is not None else number(planned)


def _is_death_of_worker(entry: Entry) -> bool:
    return entry["event"] == "death" and entry.get("what") == "worker"
