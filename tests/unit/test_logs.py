"""The two log formats."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import threading
import time

import pytest

from dynamo_worker import logs
from dynamo_worker.supervisor import output
from dynamo_worker.supervisor.output import write_now


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
    assert os.environ["DYN_LOG"] == "debug"


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as stream:
        yield reading, stream
    os.close(reading)


def fill(descriptor):
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += write_now(descriptor, b"x" * 4096)
    return filled


def read(descriptor, size):
    data = b""
    while len(data) < size:
        data += os.read(descriptor, size - len(data))
    return data


def test_a_line_is_out_when_the_call_returns(stream, pipe):
    """What follows may hold the interpreter for ever."""
    reading, writing = pipe
    logs.setup(stream=logs.UnblockedStream(writing))
    logs.get_logger("a").info("hello")
    os.set_blocking(reading, False)
    assert os.read(reading, 1000).endswith(b" INFO a: hello\n")


def test_a_reader_that_hangs_holds_up_nobody_and_misses_nothing_later(stream, pipe):
    reading, writing = pipe
    unblocked = logs.UnblockedStream(writing)
    logs.setup(stream=unblocked)
    filled = fill(writing.fileno())
    since = time.monotonic()
    for number in range(500):
        logs.get_logger("a").info("line", number=number)
    assert time.monotonic() - since < 2
    assert sum(thread.name == "log writer" for thread in threading.enumerate()) == 1
    read(reading, filled)
    seen = b""
    while b"number=499" not in seen:
        seen += os.read(reading, 1 << 16)
    assert re.findall(rb"number=(\d+)\n", seen) == [b"%d" % number for number in range(500)]
    since = time.monotonic()
    while unblocked._writer is not None:
        assert time.monotonic() - since < 5, "the thread ends when nothing waits"
        time.sleep(0.001)


def test_what_is_lost_is_counted_in_the_format_of_the_log(stream, pipe, monkeypatch):
    reading, writing = pipe
    monkeypatch.setattr(output, "MOST_WAITING", 1000)
    unblocked = logs.UnblockedStream(writing)
    logs.setup(log_format="json", stream=unblocked)
    filled = fill(writing.fileno())
    for number in range(100):
        logs.get_logger("a").info("line", number=number)
    read(reading, filled)
    seen = b""
    while b"Log lines lost" not in seen or not seen.endswith(b"\n"):
        seen += os.read(reading, 1 << 16)
    events = [json.loads(line) for line in seen.splitlines()]
    assert events[-1]["message"] == "Log lines lost: the reader is not keeping up"
    assert events[-1]["lines"] == 100 - (len(events) - 1)


def test_the_end_waits_for_the_reader_and_not_for_ever(stream, pipe):
    reading, writing = pipe
    unblocked = logs.UnblockedStream(writing)
    filled = fill(writing.fileno())
    unblocked.write("last\n")
    since = time.monotonic()
    unblocked.drain(0.1)
    assert time.monotonic() - since < 2
    # Its thread must not find the next test's pipe behind the same descriptor.
    read(reading, filled)
    assert read(reading, 5) == b"last\n"


def test_a_forked_child_has_a_lock_and_a_buffer_of_its_own(stream, pipe):
    reading, writing = pipe
    unblocked = logs.UnblockedStream(writing)
    filled = fill(writing.fileno())
    unblocked.write("parent\n")
    with unblocked._lock:
        pid = os.fork()
        if pid == 0:
            unblocked.write("child\n")
            os._exit(0 if unblocked._output.pending else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    read(reading, filled)
    assert read(reading, 7) == b"parent\n"
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)


def test_it_stands_for_the_stream(pipe):
    unblocked = logs.UnblockedStream(pipe[1])
    assert unblocked.fileno() == pipe[1].fileno()
    assert not unblocked.isatty()
    unblocked.writelines(["a\n", "b\n"])
    unblocked.flush()
    assert os.read(pipe[0], 100) == b"a\nb\n"


def test_a_text_cannot_forge_lines(stream):
    logs.setup(stream=stream)
    forged = "x\n2026-11-21T01:02:03.456Z ERROR dynamo_worker: forged\x9b31m\u2028\u202e"
    logs.get_logger("a").error(forged, exc_info=ValueError(forged), reason=forged)
    first, *others = stream.getvalue().splitlines()
    assert first.endswith("x")
    assert all(line.startswith("    ") for line in others)
    assert not set("\x9b\u2028\u202e") & set(stream.getvalue())


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_long_texts_are_cut_and_a_traceback_stays_whole(stream, log_format):
    logs.setup(log_format=log_format, stream=stream)
    text = "a" * (1 << 20)
    logs.get_logger("a").error(text, exc_info=ValueError(text), reason=text, error=ValueError(text), list=[text])
    assert len(stream.getvalue()) < 100_000
    assert stream.getvalue().count("aaa…" if log_format == "text" else "aaa\\u2026") == 5

    def deep(depth):
        if depth:
            deep(depth - 1)
        raise ValueError("x" * 2000 + " the end")

    stream.truncate(0)
    with pytest.raises(ValueError, match="the end") as caught:
        deep(100)
    logs.get_logger("a").error("Failed", exc_info=caught.value)
    assert not re.search(r"…|\\u2026", stream.getvalue())
    assert "x the end" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_fields_that_are_secrets(stream, log_format):
    logs.setup(log_format=log_format, stream=stream)
    logs.get_logger("a").error("m", token="abc", x={"api_key": ["abc"]}, auth_key=ValueError("abc"), password="abc")
    assert "abc" not in stream.getvalue()
    assert stream.getvalue().count("***") == 4


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_passwords(stream, log_format):
    logs.setup(log_format=log_format, stream=stream)
    address = "nats://me:hunter2@host:4222"
    logs.get_logger("a").error(
        f"{address}", exc_info=ValueError(address), tried=address, error=OSError(address), list=[address]
    )
    assert "hunter2" not in stream.getvalue()
    assert "host:4222" in stream.getvalue()
