"""Output that does not wait for its reader: nothing is lost in the normal case, and what is lost is counted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import resource
import select
import socket
import tty

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_worker.supervisor import output as module
from dynamo_worker.supervisor.output import Output, write_now

from .pipes import fill, lost, read


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_what_is_read_is_what_was_written(pipe):
    out = Output(pipe[1], lost)
    out.write(b"one\ntw")
    out.write(b"o\n")
    assert read(pipe[0]) == b"one\ntwo\n"
    assert not out.pending


def test_a_reader_that_comes_back_gets_everything_that_fits(pipe):
    out = Output(pipe[1], lost)
    filled = fill(pipe[1])
    lines = b"".join(b"line %d\n" % number for number in range(1000))
    out.write(lines)
    assert out.pending
    seen = read(pipe[0])
    out.drain(5)
    assert (seen + read(pipe[0]))[filled:] == lines


def test_what_is_too_much_is_dropped_and_counted(pipe, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 100)
    out = Output(pipe[1], lost)
    filled = fill(pipe[1])
    for number in range(50):
        out.write(b"line %d\n" % number)
    seen = read(pipe[0])
    out.flush()
    out.write(b"again\n")
    lines = (seen + read(pipe[0]))[filled:].splitlines()
    kept = len(lines) - 2
    assert lines == [*(b"line %d" % number for number in range(kept)), b"lost %d" % (50 - kept), b"again"]


def test_what_is_lost_is_said_although_nothing_follows(pipe, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    out = Output(pipe[1], lost)
    filled = fill(pipe[1])
    out.write(b"kept\n")
    out.write(b"a line that is too long\n")
    seen = read(pipe[0])
    out.flush()
    assert (seen + read(pipe[0]))[filled:] == b"kept\nlost 1\n"


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_lines_are_whole_and_counted_whatever_the_reader_does(data):
    """Whatever arrives in which pieces, and whenever the reader takes how much: in order, and counted."""
    reading, writing = os.pipe()
    try:
        fcntl.fcntl(writing, 1031, 4096)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "MOST_WAITING", 600)
            out = Output(writing, lost)
            lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=60))
            sent = [b"%d:" % number + b"y" * length for number, length in enumerate(lengths)]
            stream = b"".join(line + b"\n" for line in sent)
            seen = b""
            while stream:
                size = data.draw(st.integers(1, 900))
                out.write(stream[:size])
                stream = stream[size:]
                if data.draw(st.booleans()):
                    seen += (
                        os.read(reading, data.draw(st.integers(1, 4096)))
                        if select.select([reading], [], [], 0)[0]
                        else b""
                    )
            while out.pending:
                seen += read(reading)
                out.flush()
            out.write(b"end\n")
            seen += read(reading)
    finally:
        os.close(reading)
        os.close(writing)
    assert seen.endswith(b"end\n")
    missing = 0
    expected = iter(sent)
    for line in seen.splitlines()[:-1]:
        if line.startswith(b"lost "):
            missing += int(line[5:])
            continue
        following = next(expected)
        while line != following:  # it was dropped, or cut where the loss begins
            missing -= 1
            if line and following.startswith(line) and b":" in line:
                break
            following = next(expected)
    missing -= len(list(expected))
    assert missing == 0


def test_others_who_share_the_pipe_keep_their_flags(pipe):
    Output(pipe[1], lost).write(b"line\n")
    assert os.get_blocking(pipe[1])


@pytest.mark.parametrize("careful", [False, True])
def test_a_full_pipe_does_not_block(pipe, monkeypatch, careful):
    if careful:  # a pipe of another user cannot be opened again

        def refuse(*arguments):
            raise PermissionError

        monkeypatch.setattr(module.os, "open", refuse)
    written = fill(pipe[1])
    assert written >= 4096
    with pytest.raises(BlockingIOError):
        write_now(pipe[1], b"x")
    assert len(read(pipe[0])) == written


def test_a_socket_that_nobody_reads_does_not_block():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        out = Output(ours.fileno(), lost)
        for _ in range(200):
            out.write(b"x" * 9999 + b"\n")
        assert out.pending
        assert ours.getblocking()


def test_a_socket_without_a_descriptor_to_spare():
    ours, theirs = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        out = Output(ours.fileno(), lost)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            out.write(b"one\n")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert theirs.recv(100) == b"one\n"
        out.write(b"two\n")
        assert theirs.recv(100) == b"two\n"


def test_what_waits_is_written_by_one_process(pipe):
    fill(pipe[1])
    out = Output(pipe[1], lost)
    out.write(b"one\n")
    child = os.fork()
    if child == 0:
        try:
            out.forget()
            out.drain(10)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    read(pipe[0])
    out.drain(1)
    assert read(pipe[0]) == b"one\n"


def test_a_terminal_that_is_held_does_not_block():
    """Ctrl-S, or a connection that hangs."""
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        out = Output(slave, lost)
        for _ in range(200):
            out.write(b"x" * 999 + b"\n")
        assert out.pending
        assert os.get_blocking(slave)
        assert read(master, 4096).startswith(b"xxx")
    finally:
        os.close(master)
        os.close(slave)


def test_nobody_there(pipe):
    os.close(pipe[0])
    out = Output(pipe[1], lost)
    out.write(b"line\n")
    assert not out.pending
    closed = Output(pipe[1], lost)
    os.close(pipe[1])
    closed.write(b"line\n")
    assert not closed.pending


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    path = tmp_path / "log"
    full = os.open("/dev/full", os.O_WRONLY)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    out = Output(log, lost)
    out.write(b"first\n")
    saved = os.dup(log)
    os.dup2(full, log)
    out.write(b"second\nthird\n")
    out.write(b"fourth\n")
    os.dup2(saved, log)
    out.write(b"fifth\n")
    for descriptor in (full, log, saved):
        os.close(descriptor)
    assert path.read_bytes() == b"first\nlost 3\nfifth\n"
