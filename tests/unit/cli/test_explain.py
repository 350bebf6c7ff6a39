"""`dynamo-worker explain`: what it tells of records, and what it says of files that are none."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.cli.explain import command, records, screen
from dynamo_worker.cli.explain.account import account, unknowns
from dynamo_worker.cli.explain.advice import ADVICE, runbook_link
from dynamo_worker.cli.explain.page import COLOURS, SHAPES, TEXTS, html
from dynamo_worker.errors import UsageError
from dynamo_worker.supervisor.exit_kinds import ExitKind
from dynamo_worker.supervisor.record_file import FORMAT, RecordFile

PLAN = {"unregister": 1.0, "grace": 1.0, "drain": 21.0, "cleanup": 5.0, "kill_reserve": 2.0}
START = {"t": 0.0, "event": "start", "format": FORMAT, "time": 1.795e9, "version": "0.2.0", "host": "h", "pid": 10}
STATES = (
    (2.0, "STARTING", {}),
    (3.0, "SERVING", {}),
    (9.0, "UNREGISTERING", {"completed": 5}),
    (9.1, "GRACE", {"completed": 5}),
    (10.1, "DRAINING", {"completed": 6}),
    (12.1, "CLEANUP", {"completed": 7, "handed_off": 2}),
    (12.6, "STOPPED", {"completed": 7, "handed_off": 2}),
)


def stopped() -> list[dict]:
    """Return the record of a worker that was stopped by a signal."""
    note = {"level": "INFO", "message": "Received shutdown signal", "fields": {"signal": "SIGTERM", "stop_level": 1}}
    return [
        START,
        {"t": 1.9, "event": "settings", "engine": "echo", "drain": "complete", "plan": PLAN},
        *({"t": t, "event": "state", "state": state, "counts": counts} for t, state, counts in STATES[:2]),
        {"t": 2.9, "event": "step", "name": "engine", "seconds": 0.8},
        {"t": 3.0, "event": "ready", "model": "m", "instance": "abc", "seconds": 2.9},
        {"t": 5.0, "event": "sample", "in_flight": 3, "memory": 1 << 30},
        {"t": 8.9, "event": "note", **note},
        *({"t": t, "event": "state", "state": state, "counts": counts} for t, state, counts in STATES[2:]),
        {"t": 12.5, "event": "hook", "hook": "cleanup", "plugin": "echo", "seconds": 0.4, "error": "<b>boom</b>"},
        {"t": 12.6, "event": "sample", "in_flight": 0, "memory": 1 << 29},
        {"t": 12.7, "event": "death", "what": "worker", "pid": 11, "exit_code": 0},
        {
            "t": 12.8, "event": "end", "code": 0, "kind": "stopped", "reason": "stopped by SIGTERM", "by": "supervisor",
            "ran": 12.7, "cleaned": {"processes": 1, "killed": ["12 (python)"], "segments": 2, "seconds": 0.1},
        },
    ]  # fmt: skip


def written(place: Path, entries: list[dict]) -> Path:
    """Write a record of a worker that is over."""
    record = RecordFile.create(str(place), 100)
    for entry in entries:
        record.append(entry)
    record.close()
    return place / record.name


def text_of(entries: list[dict]) -> str:
    return "\n".join(screen.lines(account("FILE", entries, running=False)))


def test_a_stop_is_told_in_full():
    told = account("FILE", stopped(), running=False)
    assert unknowns(told) == []
    assert told.exit is not None
    assert (told.exit.code, told.exit.kind, told.exit.stage) == (0, "stopped", "STOPPED")
    assert (told.requests.finished, told.requests.cut, told.requests.lost) == (2, {"handed_off": 2}, 0)
    took = {stage.name: (round(stage.took, 3), stage.planned) for stage in told.stages}
    assert took == {
        "load": (2.0, None), "start": (1.0, None), "serve": (6.0, None), "unregister": (0.1, 1.0), "grace": (1.0, 1.0),
        "drain": (2.0, 21.0), "cleanup": (0.5, 5.0), "kill": (0.1, 2.0),
    }  # fmt: skip
    assert [(entry["signal"], entry["level"]) for entry in told.signals] == [("SIGTERM", 1)]


def test_a_death_in_service_counts_what_was_in_flight():
    entries = [entry for entry in stopped() if entry["t"] < 8]
    entries.append({"t": 8.0, "event": "sample", "in_flight": 4, "counts": {"completed": 5}})
    entries.append({"t": 8.0, "event": "death", "what": "worker", "pid": 11, "signal": "SIGKILL"})
    end = {"code": 137, "kind": "killed-by-signal", "reason": "worker killed by SIGKILL", "by": "supervisor"}
    entries.append({"t": 8.1, "event": "end", **end, "cleaned": {"processes": 0}})
    told = account("FILE", entries, running=False)
    assert unknowns(told) == []
    assert (told.requests.lost, told.requests.finished, told.exit.stage) == (4, 0, "SERVING")
    assert "in flight when the process died: 4" in text_of(entries)
    assert "worker 11: killed by SIGKILL" in text_of(entries)


def test_a_fatal_error_is_told_with_the_stage_before_it():
    entries = [entry for entry in stopped() if entry["t"] < 8]
    entries.append({"t": 8.0, "event": "state", "state": "FATAL", "deadline_in": 11.5})
    entries.append({"t": 9.0, "event": "end", "code": 1, "kind": "engine-dead", "reason": "died", "by": "supervisor"})
    assert unknowns(account("FILE", entries, running=False)) == ["what was cleaned", "how the worker's process ended"]
    told = account("FILE", entries, running=False)
    assert told.exit.stage == "SERVING"
    assert [stage.planned for stage in told.stages if stage.name == "fatal"] == [11.5]


def test_a_record_without_an_end_says_so():
    entries = [entry for entry in stopped() if entry["t"] < 8]
    told = account("FILE", entries, running=False)
    assert (told.exit.code, told.exit.kind, told.exit.by) == (137, "all-killed", "nobody")
    assert unknowns(told) == ["what was cleaned"]
    assert "nothing yet" in text_of(entries)


def test_a_wrong_flag_has_no_state():
    end = {"code": 2, "kind": "usage", "reason": "--drain: expected a mode", "by": "supervisor", "cleaned": {"a": 1}}
    death = {"t": 1.0, "event": "death", "what": "worker", "pid": 11, "exit_code": 2}
    told = account("FILE", [START, death, {"t": 1.1, "event": "end", **end}], running=False)
    assert unknowns(told) == []
    assert told.exit is not None
    assert told.exit.stage == "LOADING"
    assert [stage.name for stage in told.stages] == ["load", "kill"]
    assert "it was importing its code" in text_of([START, death, {"t": 1.1, "event": "end", **end}])
    assert html(told)


def test_a_worker_that_runs_has_no_end():
    told = account("FILE", [entry for entry in stopped() if entry["t"] < 8], running=True)
    assert told.exit is None
    assert unknowns(told) == ["the end"]
    assert "Running   in serve" in "\n".join(screen.lines(told))
    assert "A worker that runs" in html(told)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"reason": "worker is gone, exit status unknown"}, ["cause"]),
        ({"reason": ""}, ["cause"]),
        ({"cleaned": {}}, ["what was cleaned"]),
    ],
)
def test_what_is_unknown_is_named(change, missing):
    entries = stopped()
    entries[-1] = {**entries[-1], **change}
    assert unknowns(account("FILE", entries, running=False)) == missing


def test_a_death_that_is_not_recorded_is_named():
    entries = [entry for entry in stopped() if entry["event"] != "death"]
    assert unknowns(account("FILE", entries, running=False)) == ["how the worker's process ended"]


@pytest.mark.parametrize("kind", ExitKind)
def test_each_kind_has_advice_and_a_place_in_the_runbook(kind):
    assert ADVICE[kind].endswith((".", "?"))
    assert re.fullmatch(r"docs/runbook\.md#[a-z-]+", runbook_link(kind))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(st.integers(min_value=0, max_value=15), st.sampled_from(sorted({k for e in stopped() for k in e})), anything)
def test_damaged_entries_are_told_all_the_same(number, field, value):
    entries = stopped()
    entries[number % len(entries)] = {**entries[number % len(entries)], field: value}
    entries = [entry for entry in entries if isinstance(entry.get("event"), str)]
    told = account("FILE", entries, running=False)
    assert list(screen.lines(told))
    assert html(told).endswith("</html>\n")
    json.dumps(told.as_json())


def test_nothing_that_a_terminal_acts_on_is_printed():
    entries = stopped()
    entries[-1] = {**entries[-1], "reason": "\x1b]0;owned\x07\x1b[2J\nExit      0 (stopped)"}
    shown = text_of(entries)
    assert "\x1b" not in shown
    assert len(re.findall(r"^Exit ", shown, re.MULTILINE)) == 1


# --- The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYN_WORKER_RECORD_DIR", str(tmp_path / "records"))
    return tmp_path / "records"


def test_the_last_that_ended(place, capsys):
    written(place, stopped())
    path = written(place, stopped())
    running = RecordFile.create(str(place), 100)
    running.append(START)
    for argv in ([], ["--last"], [str(path)]):
        assert command.main(argv) == 0
        assert f"Record    {path}" in capsys.readouterr().out
    running.close()


def test_json(place, capsys):
    written(place, stopped())
    assert command.main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exit"]["kind"] == "stopped"
    assert told["exit"]["runbook"] == "docs/runbook.md#stopped"
    assert told["cleaned"]["segments"] == 2


def test_the_page_goes_into_a_file(place, tmp_path, capsys):
    written(place, stopped())
    assert command.main(["--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"Written: {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_another_directory(place, tmp_path, capsys):
    written(tmp_path / "other", stopped())
    assert command.main(["--record-dir", str(tmp_path / "other")]) == 0
    assert str(tmp_path / "other") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no flight records in .*records: No such file"),
        (["/nonexistent"], "cannot read the flight record /nonexistent: No such file"),
        (["/dev/zero"], "cannot read the flight record /dev/zero: Not a regular file"),
        (["--html"], "--html requires a value"),
        (["a", "b"], "unknown argument 'b'"),
        (["--nonsense"], "unknown argument '--nonsense'"),
        (["--last", "a"], "unknown argument 'a'"),
    ],
)
def test_errors_say_what_and_what_next(place, argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        command.main(argv)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**START, "format": 2, "version": "9.1"}], "has format 2; this version reads format 1"),
        ([{**START, "format": "x"}], "has format 0"),
        ([{"event": "state", "state": "SERVING"}], "is no flight record"),
        ([], "is no flight record"),
    ],
)
def test_foreign_files(place, entries, message):
    path = written(place, entries)
    with pytest.raises(UsageError, match=message):
        records.of_file(str(path))


def test_an_empty_directory_and_one_that_is_not_readable(place):
    place.mkdir(parents=True)
    with pytest.raises(UsageError, match="no flight records in"):
        command.main([])


def test_a_page_that_cannot_be_written(place, tmp_path):
    written(place, stopped())
    with pytest.raises(UsageError, match="cannot write"):
        command.main(["--html", str(tmp_path / "none" / "page.html")])


# --- The page


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_the_guidelines_do():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", COLOURS)
@pytest.mark.parametrize("behind", ["background", "panel"])
def test_contrast(theme, behind):
    colours = COLOURS[theme]
    assert {name: contrast(colours[name], colours[behind]) for name in TEXTS if
            contrast(colours[name], colours[behind]) < 4.5} == {}  # fmt: skip
    assert {name: contrast(colours[name], colours[behind]) for name in SHAPES if
            contrast(colours[name], colours[behind]) < 3} == {}  # fmt: skip


def test_texts_have_the_colours_of_texts():
    page = html(account("FILE", stopped(), running=False))
    style = re.sub(r":root\{[^}]*\}", "", page[page.index("<style>") : page.index("</style>")])
    used = set(re.findall(r"var\(--(\w+)\)", style))
    assert used <= {"background", "panel", *TEXTS, *SHAPES}
    assert set(re.findall(r"[^-]color: var\(--(\w+)\)", style)) <= set(TEXTS)
    assert re.findall(r"#[0-9a-f]{3,8}\b|rgb|opacity", style) == [], "every colour is one of the checked ones"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_page_is_one_file_without_scripts():
    page = html(account("FILE", stopped(), running=False))
    parsed = _Page()
    parsed.feed(page)
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "img", "iframe", "object", "a", "form", "base"}
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not {name for name in names if name in ("src", "href", "srcset") or name.startswith("on")}
    assert "url(" not in page
    assert "@import" not in page


def test_texts_of_the_record_are_no_markup():
    page = html(account("FILE", stopped(), running=False))
    assert "&lt;b&gt;boom&lt;/b&gt;" in page
    assert "<b>boom" not in page


def test_the_page_has_labels_for_those_who_cannot_see_it():
    page = html(account("FILE", stopped(), running=False))
    assert '<html lang="en">' in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        title, description = root.find("title"), root.find("desc")
        assert title is not None
        assert title.text
        assert description is not None
        assert description.text
    assert "drain: took 2.00 s, planned at most 21.00 s" in pictures[0]
    parsed = _Page()
    parsed.feed(page)
    assert all(attributes.get("scope") == "col" for tag, attributes in parsed.elements if tag == "th")
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("h1") == tags.count("main") == 1
    assert tags.count("table") == tags.count("caption")


def test_planned_and_actual_bars_are_drawn_to_one_scale():
    page = html(account("FILE", stopped(), running=False))
    picture = ET.fromstring(re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0])
    widths = {kind: [float(bar.get("width", 0)) for bar in picture.iter("rect") if bar.get("class") == kind]
              for kind in ("planned", "took", "late")}  # fmt: skip
    assert len(widths["planned"]) == 5
    assert widths["late"] == []
    drain = widths["took"][2] / widths["planned"][2]
    assert drain == pytest.approx(2.0 / 21.0, abs=0.01)


def test_help(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: dynamo-worker explain" in out
    assert os.linesep in out
