"""The account of an end as text: one screen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.supervisor.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_worker.cli.explain.account import Account, Entry, Exit, Stage

#: Entries of one kind that are shown; the rest is counted.
_MOST: Final = 6
#: Characters of one line.
_WIDTH: Final = 110


def lines(told: Account) -> Iterator[str]:
    """Yield the lines, without anything that a terminal acts on."""
    for line in _lines(told):
        yield safe(line).replace("\n", " ")


def _lines(told: Account) -> Iterator[str]:
    yield f"Record    {told.file}"
    yield f"Worker    {worker(told)}"
    yield f"Lived     {lived(told)}"
    yield ""
    if told.exit is None:
        yield f"Running   in {told.stages[-1].name}; there is no end to explain yet"
    else:
        yield f"Exit      {told.exit.code} ({told.exit.kind})"
        yield from _wrapped("Cause     ", told.exit.reason)
        yield f"Stage     {stage_of_the_cause(told.exit)}"
    yield from _wrapped("Requests  ", requests(told))
    yield from _list("Signals   ", [signal(entry) for entry in told.signals])
    yield from _list("Deaths    ", [death(entry) for entry in told.deaths])
    yield from _wrapped("Cleaned   ", cleaned(told.cleaned))
    yield ""
    yield "STAGE         PLANNED      TOOK"
    for stage in told.stages:
        yield f"{stage.name:<12}{_planned(stage):>9}{stage.took:>8.2f} s{_judged(stage)}"
    steps = [f"{entry['name']} {_seconds(entry)}" for entry in told.steps]
    for head, said in (("Start     ", steps), ("Hooks     ", [hook(entry) for entry in told.hooks[-_MOST:]])):
        if said:
            yield from _wrapped(head, ", ".join(said))
    yield from _list("Warnings  ", [str(entry["message"]) for entry in told.notes])
    if told.dropped:
        yield f"          {told.dropped} entries in the middle of the record were dropped"
    if told.exit is not None:
        yield ""
        yield from _wrapped("Next      ", told.exit.next)
        yield f"Runbook   {told.exit.runbook}"


def stage_of_the_cause(it: Exit) -> str:
    """Describe how far the worker had come when its end began."""
    said = {"STOPPED": "every stage was completed", "LOADING": "it was importing its code"}
    return f"{it.stage} ({said[it.stage]})" if it.stage in said else it.stage


def worker(told: Account) -> str:
    """Describe who it was."""
    serving = f", model {told.model}, instance {told.instance}" if told.model else ", never ready"
    return f"{told.engine or 'no engine yet'}{serving}; dynamo-worker {told.version}, pid {told.pid} on {told.host}"


def lived(told: Account) -> str:
    """Describe when it lived."""
    began, ended = (_clock(seconds) for seconds in (told.started, told.started + told.ran))
    return f"{began} to {ended} UTC ({told.ran:.1f} s)"


def requests(told: Account) -> str:
    """Describe what became of the requests."""
    it = told.requests
    cut = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in it.cut.items()) or "none"
    parts = [f"finished during the end: {it.finished}", f"cut: {cut}"]
    if it.lost:
        parts.append(f"in flight when the process died: {it.lost} (frontends continue them on other workers)")
    if it.total:
        total = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(it.total.items()))
        parts.append(f"in its whole life: {total}")
    return "; ".join(parts)


def signal(entry: Entry) -> str:
    """Describe a stop signal."""
    return f"{entry['signal']} at {float(entry['t']):.2f} s (level {entry['level']})"


def death(entry: Entry) -> str:
    """Describe a death."""
    if "signal" in entry:
        how = f"killed by {entry['signal']}"
    elif "exit_code" in entry:
        how = f"exit code {entry['exit_code']}"
    else:
        how = "killed" if entry["what"] in ("supervisor", "worker") else "ended"
    what, pid = str(entry["what"]), str(entry.get("pid"))
    return f"{what if pid in what else f'{what} {pid}'}: {how}"


def hook(entry: Entry) -> str:
    """Describe one call of a hook."""
    failed = f" FAILED: {entry['error']}" if entry.get("error") else ""
    return f"{entry['hook']} of {entry.get('plugin')} {_seconds(entry)}{failed}"


def cleaned(report: Entry) -> str:
    """Describe what was cleaned up."""
    if not report:
        return "nothing yet: the guardian or the next start on this machine does it"
    parts = [f"{report.get('processes', 0)} processes killed{_in_brackets(report.get('killed'))}"]
    parts.append(f"{report.get('segments', 0)} shared-memory segments removed")
    withdrawn = report.get("withdrawn")
    parts.append(f"discovery: {', '.join(map(str, withdrawn))}" if isinstance(withdrawn, list) and withdrawn
                 else "nothing left in discovery")  # fmt: skip
    if report.get("gpu"):
        parts.append(f"GPU memory {report['gpu']}")
    if report.get("unkillable"):
        parts.append(f"COULD NOT KILL{_in_brackets(report['unkillable'])}")
    if report.get("by"):
        parts.append(f"by the {report['by']}")
    seconds = report.get("seconds")
    if isinstance(seconds, (int, float)):
        parts.append(f"in {seconds:.2f} s")
    return "; ".join(parts)


def _in_brackets(value: Any) -> str:
    return f" ({', '.join(map(str, value))})" if isinstance(value, list) and value else ""


def _planned(stage: Stage) -> str:
    return "-" if stage.planned is None else f"{stage.planned:.1f} s"


def _judged(stage: Stage) -> str:
    late = stage.planned is not None and stage.took > stage.planned + 0.1
    return "   longer than planned" if late else ""


def _seconds(entry: Entry) -> str:
    seconds = entry.get("seconds")
    return f"{seconds:.2f} s" if isinstance(seconds, (int, float)) else ""


def _clock(at: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
    except (OverflowError, ValueError, OSError):
        return "?"


def _list(head: str, items: list[str]) -> Iterator[str]:
    """Yield a line for each of the last items, with a heading before the first."""
    if len(items) > _MOST:
        yield f"{head}{len(items) - _MOST} earlier ones are in --json"
        head = " " * len(head)
    for item in items[-_MOST:]:
        yield from _wrapped(head, item)
        head = " " * len(head)


def _wrapped(head: str, text: str) -> Iterator[str]:
    import textwrap

    pieces = textwrap.wrap(text, _WIDTH - len(head)) or [""]
    yield head + pieces[0]
    yield from (" " * len(head) + piece for piece in pieces[1:])
