"""The two log formats."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from dynamo_worker import logs


@pytest.fixture
def stream():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text(stream):
    logs.setup(stream=stream)
    logs.get_logger("dynamo_worker.x").info(
        "100% done", signal="SIGTERM", reason="two words", seconds=1.50049, none=None, yes=True, empty=""
    )
    line = stream.getvalue()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO dynamo_worker\.x: 100% done ", line)
    assert line.endswith(' signal=SIGTERM reason="two words" seconds=1.5 none=none yes=true empty=""\n')


@pytest.mark.parametrize(
    ("value", "shown"),
    [("a=b", '"a=b"'), ('say "x"', '"say \\"x\\""'), ("two\nlines", '"two\\nlines"'), (3, "3"), (3.0, "3"), ("é", "é")],
)
def test_one_event_is_one_line(value, shown):
    assert logs.format_value(value) == shown


def test_json(stream):
    logs.setup(log_format="json", stream=stream)
    logs.get_logger("a.b").warning("Message", pid=1, level=2, where={"x": object})
    event = json.loads(stream.getvalue())
    assert event["message"] == "Message"
    assert event["level"] == "WARNING"
    assert event["level_"] == 2, "a field never hides a standard key"
    assert event["pid"] == 1
    assert event["logger"] == "a.b"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exceptions(stream, log_format):
    logs.setup(log_format=log_format, stream=stream)
    logs.get_logger("a").error("Failed", exc_info=ValueError("why"), x=1)
    output = stream.getvalue()
    assert "ValueError: why" in output
    assert output.count("\n") == 1 or log_format == "text"


def test_level(stream):
    logs.setup(level="warning", stream=stream)
    logs.get_logger("a").info("quiet")
    logs.get_logger("a").warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_records_of_other_libraries_look_the_same(stream):
    logs.setup(stream=stream)
    logging.getLogger("other").info("hello %s", "world")
    assert stream.getvalue().endswith(" INFO other: hello world\n")


def test_runtime_log_can_be_chosen(monkeypatch):
    monkeypatch.setenv("DYN_LOG", "debug")
    logs.quiet_runtime()
    import os

    assert os.environ["DYN_LOG"] == "debug"
