"""What processes print becomes JSON lines, or text without colours, however it is cut into pieces."""

from __future__ import annotations

import json

import pytest

from dynamo_worker.supervisor.log_lines import _MOST_HELD, JsonLines, PlainText

TRACEBACK = b'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\nValueError: no\n'


def events(*pieces: bytes) -> list[dict[str, object]]:
    lines = JsonLines()
    made = b"".join(map(lines.feed, pieces)) + lines.rest()
    assert made == b"" or made.endswith(b"\n")
    return [json.loads(line) for line in made.splitlines()]


def messages(*pieces: bytes) -> list[object]:
    return [event["message"] for event in events(*pieces)]


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_json_in_pieces(size):
    data = b'{"message": "a", "n": 1}\nplain\n{"message": "b"}\n'
    assert messages(*pieces_of(data, size)) == ["a", "plain", "b"]


def test_objects_stay_as_they_are():
    line = b'{"target":"dynamo_runtime", "level":"WARN",   "fields":{"\\u0041":1}}\n'
    assert JsonLines().feed(line) == line


@pytest.mark.parametrize("line", [b"{}x", b'{"a": 1', b"{a: 1}", b"[1]", b'"a"', b"{" * 5000 + b"}" * 5000])
def test_what_only_resembles_an_object(line):
    assert messages(line + b"\n") == [line.decode()]


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_traceback_is_one_event(size):
    first, second, third = events(*pieces_of(b"before\n" + TRACEBACK + b"after\n", size))
    assert (first["message"], third["message"]) == ("before", "after")
    assert (second["level"], second["message"]) == ("ERROR", TRACEBACK.decode().rstrip())


def test_blank_lines_are_none():
    assert messages(b"\n\n \na\n\n") == ["a"]


@pytest.mark.parametrize(
    ("line", "level"),
    [
        (b"INFO 11-28 19:12:05 [core.py:58] Loading", "INFO"),
        (b"(EngineCore pid=7) ERROR 11-28 [core.py:58] failed", "ERROR"),
        (b"[2026-11-28 19:12:05] WARN: slow", "WARNING"),
        (b"FATAL: no memory", "CRITICAL"),
        (b"an error in lower case", "INFO"),
        (b"x" * 90 + b" ERROR", "INFO"),
    ],
)
def test_levels(line, level):
    assert [event["level"] for event in events(line + b"\n")] == [level]


def test_a_progress_bar_is_its_last_state():
    assert messages(b"\r 10%", b"\r 50%", b"\r100%\n") == ["100%"]


def test_bytes_that_are_no_text():
    assert messages(b"\xff\x00\n") == ["\\xff\x00"]


def test_a_line_without_end_is_bounded():
    lines = JsonLines()
    made = b""
    for _ in range(20):
        made += lines.feed(b"x" * (_MOST_HELD // 4))
        assert len(lines._held) < _MOST_HELD
    made += lines.rest()
    assert sum(len(json.loads(line)["message"]) for line in made.splitlines()) == 5 * _MOST_HELD


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_colours_go(size):
    data = b"\x1b[2m2026\x1b[0m \x1b[1;31mERROR\x1b[0m \x1b]0;title\x07x \x1b]8;;u\x1b\\y\n"
    text = PlainText()
    assert b"".join(map(text.feed, pieces_of(data, size))) + text.rest() == b"2026 ERROR x y\n"
    lines = JsonLines()
    assert json.loads(b"".join(map(lines.feed, pieces_of(data, size))))["message"] == "2026 ERROR x y"


@pytest.mark.parametrize("data", [b"plain\n", b"no end", b"\x1b", b"a\x1b[", b"\x1b[" + b"1;" * 99 + b"\n"])
def test_other_text_stays(data):
    text = PlainText()
    assert text.feed(data) + text.rest() == data


def test_escapes_that_never_end_are_not_held_for_ever():
    text = PlainText()
    for _ in range(99):
        text.feed(b"\x1b[" + b"1;" * 99)
        assert len(text._held) <= 32


def test_a_traceback_that_never_ends_is_not_held_for_ever():
    lines = JsonLines()
    made = lines.feed(TRACEBACK[: TRACEBACK.index(b"ValueError")])
    assert made == b""
    for _ in range(2000):
        made += lines.feed(b'  File "x.py", line 1, in f\n')
    assert made
    assert len(lines._event) < 600


def test_a_traceback_whose_process_died():
    cut = TRACEBACK[: TRACEBACK.index(b"ValueError")]
    assert messages(cut) == [cut.decode().rstrip()]
