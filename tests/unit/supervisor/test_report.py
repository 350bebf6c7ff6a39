from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path

import pytest

from dynamo_worker.supervisor import output, report


@contextlib.contextmanager
def piped_stderr():
    """Put a pipe in the place of descriptor 2; gives a function that reads what was written."""
    reading, writing = os.pipe()
    saved = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    os.set_blocking(reading, False)

    def read() -> str:
        try:
            return os.read(reading, 1 << 20).decode()
        except BlockingIOError:
            return ""

    try:
        yield read
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(reading)


class TestLog:
    def test_text(self):
        with piped_stderr() as stderr:
            report.Log("dynamo_worker.supervisor").info(
                "Message here", a=1, b="two words", c=1.23456, d=None, e=True, f="x=y", g="", h="a\nb", i="…"
            )
            line = stderr()
            assert re.match(
                r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO dynamo_worker\.supervisor: Message here a=1", line
            )
            assert line.endswith(' b="two words" c=1.235 d=none e=true f="x=y" g="" h="a\\nb" i=…\n')

    def test_json(self):
        with piped_stderr() as stderr:
            report.Log("dynamo_worker.guardian", as_json=True).error("It's over", pid=7, what="a b")
            event = json.loads(stderr())
            event.pop("time")
            expected = {
                "level": "ERROR",
                "logger": "dynamo_worker.guardian",
                "message": "It's over",
                "pid": 7,
                "what": "a b",
            }
            assert event == expected

    def test_long_lines_are_cut(self):
        with piped_stderr() as stderr:
            report.Log("x").warning("m", text="ä" * 10000)
            report.Log("x", as_json=True).warning("m", text="ä" * 10000)
            text, event = stderr().splitlines()
        assert len(text) < 1000
        assert json.loads(event)["text"].endswith("ä…")

    @pytest.mark.parametrize("as_json", [False, True])
    def test_what_is_cut_is_redacted_first(self, as_json):
        cut = "a" * 680 + " nats://user:s3cret" + "password" * 100 + "@host"
        with piped_stderr() as stderr:
            report.Log("x", as_json=as_json).warning("m", reason=cut, error=OSError(cut))
            line = stderr()
        assert "s3cret" not in line
        assert line.count("***") == 2

    @pytest.mark.parametrize("as_json", [False, True])
    def test_fields_that_are_secrets(self, as_json):
        with piped_stderr() as stderr:
            report.Log("x", as_json=as_json).warning("m", token="abc", hf_token=Path("abc"), where={"api_key": ["abc"]})
            line = stderr()
        assert "abc" not in line
        assert line.count("***") == 3

    def test_a_reader_that_does_not_read_costs_lines_and_not_time(self):
        with piped_stderr() as stderr:
            log = report.Log("x")
            lines = 2 * output.MOST_WAITING // 3900
            since = time.monotonic()
            for _ in range(lines):
                log.info("y" * 3900)
            assert time.monotonic() - since < 2
            seen = ""
            while log.output.pending:
                seen += stderr()
                log.output.flush()
            log.info("again")
            seen += stderr()
            lost = re.search(
                r"WARNING x: Log lines lost: the reader is not keeping up lines=(\d+)\n.* INFO x: again\n$", seen
            )
            assert lost
            assert seen.count("yyy\n") + int(lost[1]) == lines

    def test_a_closed_stderr(self):
        saved = os.dup(2)
        os.close(2)
        try:
            report.Log("x").info("nobody hears this")
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class TestTerminationMessage:
    def test_is_cut_to_what_kubernetes_reads(self, tmp_path):
        path = tmp_path / "log"
        path.write_text("x" * 9000)
        report.write_termination_message(str(path), "reason " * 1000)
        assert path.stat().st_size == 4096

    @pytest.mark.parametrize(
        "planted", ["link", "hard link", "fifo", "fifo with a reader", "socket", "directory", "device"]
    )
    def test_is_written_to_nothing_but_its_own_file(self, tmp_path, planted):
        path, victim = tmp_path / "log", tmp_path / "victim"
        victim.write_text("precious")
        reader, listener = None, socket.socket(socket.AF_UNIX)
        if planted == "link":
            path.symlink_to(victim)
        elif planted == "hard link":
            path.hardlink_to(victim)
        elif planted.startswith("fifo"):
            os.mkfifo(path)
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if "reader" in planted else None
        elif planted == "socket":
            listener.bind(str(path))
        elif planted == "directory":
            path.mkdir()
        else:
            path = Path("/dev/null")
        with listener, pytest.raises(OSError, match=r"."):
            report.write_termination_message(str(path), "x")
        assert victim.read_text() == "precious"
        if reader is not None:
            assert os.read(reader, 1) == b"", "nobody has written"
            os.close(reader)

    def test_is_never_created(self, tmp_path):
        report.write_termination_message(str(tmp_path / "log"), "x")
        assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_neither_control_characters_nor_passwords(as_json, tmp_path):
    bad = "a\x9b\x85\u2028\u202eb\nnats://me:hunter2@host"
    with piped_stderr() as stderr:
        report.Log("x", as_json=as_json).error("Message", reason=bad, error=OSError(bad))
        line = stderr()
    message = tmp_path / "termination-log"
    message.touch()
    report.write_termination_message(str(message), bad)
    assert line.splitlines() == [line.rstrip("\n")]
    for shown in (line, message.read_text()):
        assert not set("\x9b\x85\u2028\u202e") & set(shown)
        assert "hunter2" not in shown
        assert "***@host" in shown
    assert not as_json or "\x9b" in json.loads(line)["reason"]
