"""The filter in front of stderr: tracebacks printed by native code go to the log, everything else passes."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.host.native_output import FrontendOutput, NativeOutputFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


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
    with caplog.at_level(logging.DEBUG, "dynamo_worker.host.native_output"):
        import _thread
        import time

        _thread.start_new_thread(output.write, ("Traceback (most recent call last):\nBoom: no\n",))
        deadline = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert stream.getvalue() == ""
    assert [record.fields["text"] for record in caplog.records] == ["Traceback (most recent call last):", "Boom: no"]


COMPLETED = (
    b"\x1b[2m2026-11-21T14:15:07.711002Z\x1b[0m \x1b[32m INFO\x1b[0m \x1b[1mhttp-request\x1b[0m:"
    b"\x1b[1mrouter.route_request\x1b[0m: \x1b[2mrequest_span\x1b[0m\x1b[2m:\x1b[0m route request completed "
    b'request.outcome="success"\n'
)
FAILED = COMPLETED.replace(b"32m INFO", b"33m WARN")
PLAIN = b"2026-11-21T14:15:07.711002Z  INFO request_span: route request completed\n"
JSON = b'{"time":"2026-11-21T14:30:06.467463Z","level":"INFO","target":"request_span","message":"route"}\n'
OURS = b"2026-11-21T14:15:07.711Z INFO dynamo_worker.host.frontend.main: request_span: no line of the runtime\n"


@pytest.fixture
def through(tmp_path: Path) -> Iterator[Callable[[Sequence[bytes]], bytes]]:
    """Write pieces to descriptor 2 with the filter in front of a file; return what arrives in the file."""
    saved = os.dup(2)

    def write(pieces: Sequence[bytes]) -> bytes:
        with open(tmp_path / "stderr", "wb", buffering=0) as file:
            os.dup2(file.fileno(), 2)
        output = FrontendOutput()
        try:
            for piece in pieces:
                os.write(2, piece)
            output.close()
        finally:
            os.dup2(saved, 2)
        return (tmp_path / "stderr").read_bytes()

    yield write
    os.close(saved)


def test_the_line_of_a_request_is_left_out_and_all_else_passes(through: Callable[[Sequence[bytes]], bytes]) -> None:
    kept = [
        FAILED,
        OURS,
        JSON.replace(b"INFO", b"ERROR"),
        b"\xff\r\n",
        b"\n",
        b"Traceback:\n",
        b"the end, without a newline",
    ]
    pieces = [COMPLETED, kept[0], PLAIN, kept[1], JSON, *kept[2:6], COMPLETED, kept[6]]
    assert through(pieces) == b"".join(kept)


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_lines_may_come_in_any_pieces(through: Callable[[Sequence[bytes]], bytes], size: int) -> None:
    text = (OURS + COMPLETED + FAILED) * 20
    assert through([text[at : at + size] for at in range(0, len(text), size)]) == (OURS + FAILED) * 20


def test_a_line_without_an_end_is_not_held_for_ever(through: Callable[[Sequence[bytes]], bytes]) -> None:
    assert through([b"x" * 10_000] * 30 + [b"\n", COMPLETED]) == b"x" * 300_000 + b"\n"


def test_without_a_thread_stderr_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would see the error that says so."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before = os.fstat(2)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        FrontendOutput()
    assert os.path.samestat(os.fstat(2), before)


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    """What it should have read is dropped; native code that logs goes on."""
    reading, writing = os.pipe()
    saved = os.dup(2)
    os.dup2(writing, 2)
    output = FrontendOutput()
    try:
        started = time.monotonic()
        for _ in range(600):
            os.write(2, OURS * 50)
        assert time.monotonic() - started < 20
        output.close()
        os.set_blocking(reading, False)
        assert os.read(reading, 1 << 20).startswith(OURS)
    finally:
        os.dup2(saved, 2)
        for descriptor in (saved, reading, writing):
            os.close(descriptor)
