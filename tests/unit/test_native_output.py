"""The filter in front of stderr: tracebacks printed by native code go to the log, everything else passes."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from dynamo_worker.native_output import NativeOutputFilter


def test_python_code_writes_through() -> None:
    stream = io.StringIO()
    output = NativeOutputFilter(stream)
    print("hello", file=output)
    assert stream.getvalue() == "hello\n"


def test_other_attributes_are_those_of_the_stream() -> None:
    stream = io.StringIO()
    output = NativeOutputFilter(stream)
    output.write("a")
    output.flush()
    assert output.getvalue() == "a"
    assert not output.isatty()


def test_a_traceback_that_python_code_prints_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import traceback

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", NativeOutputFilter(stream))
    try:
        raise RuntimeError("seen")
    except RuntimeError:
        traceback.print_exc()
    assert "RuntimeError: seen" in stream.getvalue()


def test_native_code_is_logged_at_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    output = NativeOutputFilter(stream)
    # A C function as the caller of write(), and no Python frame below it: a thread whose target is native.
    with caplog.at_level(logging.DEBUG, "dynamo_worker.native_output"):
        import _thread
        import time

        _thread.start_new_thread(output.write, ("Traceback (most recent call last):\nBoom: no\n",))
        deadline = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert stream.getvalue() == ""
    assert [record.fields["text"] for record in caplog.records] == ["Traceback (most recent call last):", "Boom: no"]
